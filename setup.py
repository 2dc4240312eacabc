"""Packaging: everything is read from settings.ini, the one place for version and requirements."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_name']

wings = sorted(p.parent.name for p in Path(__file__).parent.glob(f'{lib}/*/__init__.py')) # folders of rooms
# cards and the master notebook live at the top level and travel inside the package as ipo_nb/data_cards and ipo_nb/nbs
folders = {lib: lib, f'{lib}.data_cards': 'data_cards', f'{lib}.nbs': 'nbs'}

setup(
    name=lib,
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    project_urls={'Source': cfg['git_url']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Framework :: Jupyter',
    ],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    python_requires=f">={cfg['min_python']}",
    packages=[*folders, *(f'{lib}.{wing}' for wing in wings)],
    package_dir=folders,
    package_data={
        lib: ['models/*/*'],
        f'{lib}.data_cards': ['*.md', 'paper/*'],
        f'{lib}.nbs': ['run_dataset.ipynb', 'sweeps/*.yaml'],
    },
    install_requires=cfg['requirements'].split(),
    extras_require={x: cfg[f'{x}_requirements'].split() for x in ('dev', 'ray')},
    entry_points={'console_scripts': cfg.get('console_scripts', '').split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
    zip_safe=False,
)
