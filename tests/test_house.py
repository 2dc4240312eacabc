"""The house: rooms on floors, no circle, no reading of another room's private names, and lines that can be read."""
import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
import pytest
import style

root = Path(__file__).resolve().parent.parent
package = root/'ipo_nb'

# From the ground up; a room imports from the floors below its own. A folder is a wing: it stands here once, and its
# rooms may import each other. A new room is put here, and into the table of CONTRIBUTING.md.
FLOORS = [
    {'core'},
    {'miniworld', 'scorer', 'meta_prompt', 'llm', 'stats'},
    {'data', 'mini_clip', 'captioning', 'evaluation', 'optimizer', 'choice', 'readability'},
    {'evidence', 'download'},
    {'paper', 'peers'},
    {'study'},
    {'cluster'},
    {'sweep'},
    {'commands'},
]
WITHOUT_TORCH = 'stats', 'evidence' # read records on any machine
FILES = {}
for _path in sorted(package.rglob('*.py')):
    if _path.name[0] != '_': FILES['.'.join(_path.relative_to(package).with_suffix('').parts)] = _path


def floor(room): # 0 is the ground; a room without one stands above all
    return next((i for i, rooms in enumerate(FLOORS) if room.split('.')[0] in rooms), len(FLOORS))


@cache
def tree(room): return ast.parse(FILES[room].read_text(encoding='utf-8'))


def _module(node, room): # the dotted name behind `from`, beginning below ipo_nb; None for another package
    if not node.level:
        first, _, rest = node.module.partition('.')
        return rest if first == 'ipo_nb' else None
    here = room.split('.')[:-node.level] if node.level <= room.count('.') + 1 else []
    return '.'.join([*here, *filter(None, [node.module])])


@cache
def imports(room):
    "Pairs of another room and the name that is taken from it (None: the room itself), also inside functions."
    out = []
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            out += [(a.name.removeprefix('ipo_nb.'), None) for a in node.names if a.name.startswith('ipo_nb.')]
        if not isinstance(node, ast.ImportFrom): continue
        module = _module(node, room)
        if module is None: continue
        for a in node.names:
            inner = '.'.join(filter(None, [module, a.name]))
            out.append((inner, None) if inner in FILES else (module, a.name))
    return [(other, name) for other, name in out if other in FILES]


def aliases(room):
    "Name in this room -> the room that it stands for."
    out = {}
    for node in ast.walk(tree(room)):
        if not isinstance(node, ast.ImportFrom): continue
        module = _module(node, room)
        for a in node.names if module is not None else ():
            inner = '.'.join(filter(None, [module, a.name]))
            if inner in FILES: out[a.asname or a.name] = inner
    return out


def private(name): return name is not None and name[0] == '_' and not name.startswith('__')


def private_reads(room):
    "Names with an underscore that a room takes from another one."
    for other, name in imports(room):
        if private(name) and other != room: yield f'{room}: from {other} import {name}'
    known = aliases(room)
    for node in ast.walk(tree(room)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name): continue
        other = known.get(node.value.id)
        if other not in (None, room) and private(node.attr): yield f'{room}:{node.lineno}: {other}.{node.attr}'


def circles(room, way=()):
    "Ways that come back to where they began."
    if room in way: return [(*way[way.index(room):], room)]
    out = []
    for other in sorted({o for o, _ in imports(room)}): out += circles(other, (*way, room))
    return out


def test_each_room_has_a_floor():
    lost = [room for room in FILES if floor(room) == len(FLOORS)]
    assert not lost, f'put them on a floor of FLOORS: {lost}'
    named = set().union(*FLOORS)
    assert named == {room.split('.')[0] for room in FILES}, 'FLOORS names rooms that are not there'
    assert sum(map(len, FLOORS)) == len(named), 'a room stands on two floors'


@pytest.mark.parametrize('room', FILES)
def test_imports_from_floors_below(room):
    wing = room.split('.')[0]
    wrong = {o for o, _ in imports(room) if o.split('.')[0] != wing and floor(o) >= floor(room)}
    assert not wrong, f'{room} stands on floor {floor(room)} and imports {sorted(wrong)}'


@pytest.mark.parametrize('room', FILES)
def test_no_circle(room):
    assert not circles(room)


@pytest.mark.parametrize('room', FILES)
def test_reads_no_private_names_of_another_room(room):
    assert not [*private_reads(room)], 'what is needed elsewhere gets a public name'


@pytest.mark.parametrize('wing', WITHOUT_TORCH)
def test_needs_no_torch(wing):
    rooms = [f'ipo_nb.{r}' for r in FILES if r.split('.')[0] == wing]
    assert rooms, f'there is no {wing}'
    code = f"import sys, {', '.join(rooms)}\nassert 'torch' not in sys.modules, 'torch is loaded'"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]


def test_lines_can_be_read():
    broken = style.report(say=lambda text: None)
    assert not broken, 'python tests/style.py shows the places: ' + '; '.join(f'{b} ({len(p)})' for b, p in broken)


def test_ruff():
    ruff = Path(sys.executable).parent/'ruff'
    command = [ruff, 'check', 'nbs', 'ipo_nb', 'tests', 'setup.py']
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:]


def test_style_counts_what_it_says():
    "By the tokens and the tree: a semicolon in a string is none."
    code = "a = ';'; b = 1\nfor x in [a]: print([y for y in [z for z in b]])\n[p for q in b for p in q]\n"
    piece = style.Piece('here', code + '#' * 130 + '\n' + '#' * 170, exported=True)
    c = style.count([piece])
    assert (c.lines, len(c.over_120), len(c.over_160)) == (5, 2, 1)
    assert (c.joined, c.one_element, c.nested) == (['here:1'], ['here:2'], ['here:2', 'here:3'])
    assert style.cell_length('#| export\na = 1\n\n' + 'b'*121) == 3
    assert style.lengths([piece])[0] == dict(median=7, ninety=7, longest=7)
    assert [limit for limit, _ in style.broken('tests', c)][1] == 'tests: lines over 160 characters'
