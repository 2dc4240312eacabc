"""README.md is nbs/index.ipynb in Markdown, with the outputs of its cells.

`python tests/readme.py` runs the one and writes the other.
"""
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

root = Path(__file__).resolve().parent.parent
index = root/'nbs'/'index.ipynb'

def render() -> str:
    text, _ = MarkdownExporter(exclude_input=True).from_notebook_node(nbformat.read(index, as_version=4))
    return re.sub(r'\n{3,}', '\n\n', text.strip()).replace('](../', '](') + '\n'

if __name__ == '__main__':
    nb = nbformat.read(index, as_version=4)
    ExecutePreprocessor().preprocess(nb, {'metadata': {'path': index.parent}})
    nbformat.write(nb, index)
    (root/'README.md').write_text(render(), encoding='utf-8')
