"""How the code of this house reads, in numbers: `python tests/style.py [FILES] [--check]`.

Counted are the code cells of the notebooks, the package and the tests. Left out of the package's count is what nbdev
writes on its own: `_modidx.py` and the `__all__` statements. With FILES only these are counted, and every place is
shown; with `--check` the exit code is 1 where a limit is broken.
"""
import argparse
import ast
import io
import json
import math
import re
import sys
import tokenize
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median

root = Path(__file__).resolve().parent.parent

WIDE, WIDEST = 120, 160    # characters of a line: at most 1 % are longer than the first, none than the second
WIDE_SHARE = .01
NESTED = 5                 # nested comprehensions per 1,000 lines
CELL = dict(median=12, ninety=24, longest=35) # lines of an exported cell

COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


@dataclass
class Piece:
    "A cell or a file: where it stands, and its code."
    place:str
    code:str
    exported:bool = False
    skip:set = field(default_factory=set) # numbers of lines that are not counted

    @property
    def lines(self): # number and text, without blank ones
        every = enumerate(self.code.split('\n'), 1)
        return [(i, line) for i, line in every if line.strip() and i not in self.skip]

    def at(self, line): return f'{self.place}:{line}'


@dataclass
class Count:
    "What was counted in a group of pieces; of what has a place, the places."
    lines:int = 0
    over_120:list = field(default_factory=list)
    over_160:list = field(default_factory=list)
    joined:list = field(default_factory=list)
    one_element:list = field(default_factory=list)
    nested:list = field(default_factory=list)

    def per_thousand(self, name): return 1000*len(getattr(self, name))/max(1, self.lines)


def parse(code, place):
    "The tree of some code; in a notebook, `await` may stand outside functions."
    return compile(code, place, 'exec', ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def python(code, place):
    "A cell without the lines that only IPython reads."
    try: parse(code, place)
    except SyntaxError: return re.sub(r'^\s*[%!].*$', '', code, flags=re.M)
    return code


def cells(path, name):
    "The code cells of a notebook."
    for i, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells'], 1):
        if cell['cell_type'] != 'code': continue
        code = python(''.join(cell['source']), name)
        exported = re.search(r'^#\|\s*exports?\b', code, re.M) is not None
        yield Piece(f'{name}:cell {i}', code, exported)


def whole(path, name):
    "A Python file; nbdev's `__all__` is not counted."
    code, skip = path.read_text(encoding='utf-8'), set()
    for node in ast.parse(code).body:
        named = isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__'
        if named: skip |= set(range(node.lineno, node.end_lineno + 1))
    yield Piece(name, code, skip=skip)


def pieces(path):
    "What a file holds."
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    yield from cells(path, name) if path.suffix == '.ipynb' else whole(path, name)


def semicolons(piece):
    "Lines of the semicolons between statements, by the tokens."
    for token in tokenize.generate_tokens(io.StringIO(piece.code + '\n').readline):
        if token.type == tokenize.OP and token.string == ';': yield token.start[0]


def _one(node): # a display that holds one element
    shown = isinstance(node, ast.List | ast.Tuple | ast.Set) and len(node.elts) == 1
    return shown and not isinstance(node.elts[0], ast.Starred)


def one_element_loops(tree):
    "Lines of `for` over a display of one element, as a statement or in a comprehension."
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and _one(node.iter): yield node.iter.lineno


def nested_comprehensions(node, inside=False):
    "Lines of comprehensions that stand inside another one, or have more than one `for`."
    here = isinstance(node, COMPREHENSIONS)
    if here and (inside or len(node.generators) > 1): yield node.lineno
    for child in ast.iter_child_nodes(node): yield from nested_comprehensions(child, inside or here)


def count(found):
    "The numbers of some pieces."
    out = Count()
    for piece in found:
        tree = parse(piece.code, piece.place)
        out.lines += len(piece.lines)
        out.over_120 += [f'{piece.at(i)} ({len(line)})' for i, line in piece.lines if len(line) > WIDE]
        out.over_160 += [f'{piece.at(i)} ({len(line)})' for i, line in piece.lines if len(line) > WIDEST]
        out.joined += map(piece.at, semicolons(piece))
        out.one_element += map(piece.at, one_element_loops(tree))
        out.nested += map(piece.at, nested_comprehensions(tree))
    return out


def cell_length(code):
    "Lines of at most 120 characters; directives and blank lines left out."
    counted = [line for line in code.split('\n') if line.strip() and not line.startswith('#|')]
    return sum(math.ceil(len(line)/WIDE) for line in counted)


def lengths(found):
    "Lengths of exported cells: median, 90th percentile, longest, and place -> length."
    by = {p.place: cell_length(p.code) for p in found if p.exported}
    if not by: return {}, by
    ordered = sorted(by.values())
    ninety = ordered[math.ceil(.9*len(ordered)) - 1]
    return dict(median=median(ordered), ninety=ninety, longest=ordered[-1]), by


def broken(group, c):
    "Pairs of a broken limit and its places."
    if len(c.over_120) > WIDE_SHARE*c.lines: yield f'{group}: more than 1 % of lines over {WIDE} characters', c.over_120
    if c.over_160: yield f'{group}: lines over {WIDEST} characters', c.over_160
    if c.joined: yield f'{group}: statements joined by semicolons', c.joined
    if c.one_element: yield f'{group}: loops over one element', c.one_element
    if c.per_thousand('nested') > NESTED:
        yield f'{group}: more than {NESTED} nested comprehensions per 1,000 lines', c.nested


def broken_cells(numbers, by):
    "The same of the exported cells' lengths."
    for name, limit in CELL.items():
        longer = [f'{place} ({n})' for place, n in by.items() if n > limit]
        if numbers and numbers[name] > limit: yield f'exported cells: {name} over {limit} lines', longer


def groups(files):
    "Group -> files; all of the repository where none is named."
    every = [Path(f).resolve() for f in files]
    for folder in () if every else ('nbs', 'ipo_nb', 'tests'): every += sorted((root/folder).rglob('*'))
    out = dict(notebooks=[], package=[], tests=[])
    for p in every:
        if p.name == '_modidx.py' or '.ipynb_checkpoints' in p.parts: continue
        if p.suffix == '.ipynb': out['notebooks'].append(p)
        elif p.suffix == '.py': out['tests' if p.parent.name == 'tests' else 'package'].append(p)
    return out


def shown(name, c):
    "A row of the table."
    share = 100*len(c.over_120)/max(1, c.lines)
    return (f"{name:10}{c.lines:>7}{len(c.over_120):>6} ({share:4.1f} %){len(c.over_160):>6}"
            f"{c.per_thousand('joined'):>9.1f}{len(c.one_element):>6}{c.per_thousand('nested'):>9.1f}")


def report(files=(), say=print):
    "Print the numbers and what breaks a limit. The broken limits, with their places."
    found = {group: [*chain.from_iterable(map(pieces, paths))] for group, paths in groups(files).items()}
    counts = {group: count(ps) for group, ps in found.items()}
    numbers, by = lengths(found['notebooks'])
    say('           lines  over 120       160  ;/1,000  loops  nested/1,000')
    for group, c in counts.items(): say(shown(group, c))
    say("(the package without nbdev's own `__all__` statements and _modidx.py)")
    if numbers: say(f"{len(by)} exported cells: " + ', '.join(f'{k} {v:g}' for k, v in numbers.items()))
    out = [*chain.from_iterable(broken(group, c) for group, c in counts.items()), *broken_cells(numbers, by)]
    for limit, places in out: say('\n'.join([f'\n{limit}: {len(places)}', *(f'  {p}' for p in places)]))
    if files:
        wide = [*chain.from_iterable(c.over_120 for c in counts.values())]
        say('\n'.join([f'\nall lines over {WIDE} characters: {len(wide)}', *(f'  {p}' for p in wide)]))
    return out


def main(argv=None):
    "The command; the exit code."
    cli = argparse.ArgumentParser('style.py', description=__doc__.split('\n')[0])
    cli.add_argument('files', nargs='*', help='notebooks and Python files (default: all of the repository)')
    cli.add_argument('--check', action='store_true', help='exit with 1 where a limit is broken')
    args = cli.parse_args(argv)
    found = report(args.files)
    return int(bool(found) and args.check)


if __name__ == '__main__': sys.exit(main())
