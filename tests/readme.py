"""README.md is nbs/index.ipynb in Markdown. `python tests/readme.py` writes it; a test compares the two."""
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent

def render() -> str:
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return text.strip().replace('](../', '](').replace('src="../', 'src="') + '\n'

if __name__ == '__main__': (root/'README.md').write_text(render(), encoding='utf-8')
