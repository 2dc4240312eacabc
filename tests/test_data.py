"Cards, real trees and bad input: what is no documentation and so stands beside the notebook."
import functools, hashlib, json, random, shutil
from pathlib import Path
import pytest
from PIL import Image
from ipo_nb.core import IpoError, project_dir
from ipo_nb.data import (LAYOUTS, PARTS, SPLIT_SOURCES, Card, FileImage, cards_table, card_names, describe, few_shot, halves, items_sha,
                         load_card, load_dataset, read_card, read_split, subset)
from ipo_nb.miniworld import MINI, class_names, sizes

REAL = project_dir().parent/'shared'/'real'
real = pytest.mark.skipif(not REAL.exists(), reason='the real photographs (../shared/real) are not on this machine')
PAPER = ['caltech101', 'dtd', 'eurosat']


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    "Nothing here may depend on the current folder."
    monkeypatch.chdir(tmp_path_factory.mktemp('cwd'))


def says(fn, *words):
    "The one sentence with which `fn` refuses."
    with pytest.raises(IpoError) as e: fn()
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text
    return text


@functools.cache
def lists(name):
    "The whole published split, read without its images."
    return load_dataset(name, REAL/'data', check=False)


def tree(root, counts, start=0):
    "Class folders of tiny images, all different."
    for c, n in counts.items():
        (root/c).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.new('RGB', (4, 4), (start + i, len(c), 9)).save(root/c/f'{i}.png')
    return root


# ---- cards

def test_each_card_is_sound():
    for name in card_names():
        card = load_card(name)
        assert card.layout in {*LAYOUTS, 'miniworld'} and card.prose
        if name != 'folder': assert card.classes == card.base + card.novel and set(card.splits) == set(PARTS)
        assert f'| {name} |' in cards_table()

def test_cards_of_the_miniworld_agree_with_it():
    for name in MINI:
        card, n = load_card(name), len(class_names(name))
        assert (card.classes, card.splits) == (n, {p: n*k for p, k in sizes(name).items()})
        assert card.settings.clip == 'mini'

def test_cards_of_the_paper_take_its_settings():
    for name in PAPER:
        s = load_card(name).settings
        assert (s.clip, s.steps, s.candidates, s.memory, s.shots) == ('ViT-B-16/openai', 100, 5, 20, 1)

def test_a_bad_card_is_refused_in_a_sentence(tmp_path):
    text = (project_dir()/'data_cards'/'dtd.md').read_text()
    def card(old, new): (tmp_path/'dtd.md').write_text(text.replace(old, new, 1)); return lambda: read_card(tmp_path/'dtd.md')
    card('x', 'x')()
    says(card('licence:', 'license:'), "'license' is unknown", "did you mean 'licence'?")
    says(card('base: 24', 'base: 23'), '47 classes have 24 base')
    says(card('novel: 23\n', ''), 'novel: None')
    says(card('test: 1692', 'tset: 1692'), 'splits')
    says(card('template: <CLASS> texture.', 'template: a texture'), 'template')
    says(card('template: <CLASS> texture.', 'template: <CLASS> <CLASS>'), 'template')
    says(card('task: [', 'task: [['), 'no YAML')
    says(card('name: dtd', 'name: ../dtd'), 'name')
    says(card('name: dtd', 'name: other'), 'name the file other.md')
    says(card('---\n', '--\n'), "opens with '---'")

@pytest.mark.parametrize('name', ['../../etc', '/etc/passwd', '', 'README', 'eurosat/', None, 3])
def test_no_path_is_a_dataset(name): says(lambda: load_dataset(name, '.'), 'no dataset called')

def test_unknown_dataset_says_the_nearest(): says(lambda: load_dataset('eurosta'), "did you mean 'eurosat'?")


# ---- the real trees

@real
@pytest.mark.parametrize('name,counts,classes,base,first_novel', [
    ('eurosat', (400, 200, 1200), 10, 5, 'Pasture Land'), ('caltech101', (200, 100, 200), 100, 50, None), ('dtd', (20, 10, 40), 10, 5, 'chequered')])
def test_real_subsets(name, counts, classes, base, first_novel, capsys):
    ds = load_dataset(name, REAL/'data')
    assert tuple(len(getattr(ds, p)) for p in PARTS) == counts and len(ds.classes) == classes
    assert ds.split_source == 'subset' and 'split_subset' in ds.note and ds.note in capsys.readouterr().out
    b, n = halves(ds)
    assert (len(b), len(n)) == (base, classes - base) and (first_novel in (None, n[0]))
    novel = subset(ds.test, 'novel', ds)
    assert {i.label for i in novel} == set(range(len(n))) and all(i.name == n[i.label] for i in novel)
    assert all(len(few_shot(ds, k, 1)) == k*base for k in (1, 2))
    assert describe(ds)['split_sha'] == ds.split_sha == load_dataset(name, REAL/'data', verbose=False).split_sha
    json.dumps(describe(ds))

@real
@pytest.mark.parametrize('name', PAPER)
def test_published_split_of_a_partial_tree_is_refused(name):
    says(lambda: load_dataset(name, REAL/'data', split='published'), 'are missing from', 'for example', 'unpack all of')

@real
@pytest.mark.parametrize('name', PAPER)
def test_lists_of_the_whole_split(name):
    ds = lists(name)
    assert ds.split_source == 'published' and {p: len(getattr(ds, p)) for p in PARTS} == ds.card.splits
    assert tuple(map(len, halves(ds))) == (ds.card.base, ds.card.novel)

@real
def test_every_real_image_opens():
    for name in PAPER:
        ds = load_dataset(name, REAL/'data', verbose=False)
        for i in few_shot(ds, 1, 1, 'all') + ds.test[::50]: assert i.image.open().mode == 'RGB' and len(i.image.sha()) == 64

@real
def test_eurosat_names_follow_from_its_folders():
    own = load_dataset('eurosat', REAL/'data', split='own', verbose=False)
    assert own.split_source == 'own split' and own.classes == load_dataset('eurosat', REAL/'data', verbose=False).classes

@real
@pytest.mark.parametrize('name,file', [('oxford_flowers', 'split_zhou_OxfordFlowers.json'), ('oxford_pets', 'split_zhou_OxfordPets.json')])
def test_split_files_without_images(name, file, tmp_path):
    (tmp_path/name).mkdir(); shutil.copy(REAL/'coop_splits'/file, tmp_path/name)
    ds = load_dataset(name, tmp_path, check=False)
    assert ds.split_source == 'published' and len(ds.classes) == ds.card.classes
    assert not any('_' in c for c in ds.classes)
    says(lambda: load_dataset(name, tmp_path), 'are missing from')
    says(lambda: load_dataset(name, tmp_path, split='own'), 'do not lie in class folders')
    if name == 'oxford_flowers': assert "colt's foot" in halves(ds)[0] and ds.classes[0] == 'pink primrose'

@real
@pytest.mark.parametrize('name', ['dtd', 'eurosat'])
@pytest.mark.parametrize('seed', [1, 2, 3])
@pytest.mark.parametrize('shots', [1, 16])
def test_published_few_shot_lists(name, shots, seed):
    ds = lists(name)
    path = REAL/'coop_splits'/'indices'/name/f'shot_{shots}-seed_{seed}.json'
    got = few_shot(ds, shots, seed, index=path)
    wanted = [e for e in json.loads(path.read_text())['train']['data'] if e['label'] < ds.card.base]
    assert len(got) == shots*ds.card.base
    assert {(i.image.key, i.label) for i in got} == {(e['impath'].split(ds.card.images + '/')[1], e['label']) for e in wanted}
    says(lambda: few_shot(ds, shots + 1, seed, index=path), f'shots is {shots + 1}')

@real
def test_published_list_of_other_images_is_refused():
    ds = load_dataset('dtd', REAL/'data', verbose=False)
    says(lambda: few_shot(ds, 1, 1, index=REAL/'coop_splits'/'indices'/'eurosat'/'shot_1-seed_1.json'), 'not in the training list')
    says(lambda: few_shot(ds, 1, 1, index=REAL/'README.md'), 'is no few-shot index')
    says(lambda: few_shot(ds, 1, 1, index=REAL/'READMI.md'), 'does not exist', 'README.md')

@real
def test_data_root_mistakes():
    says(lambda: load_dataset('eurosat'), 'pass data_root')
    says(lambda: load_dataset('eurosat', REAL/'dat'), 'does not exist', f"did you mean '{REAL/'data'}'?")
    says(lambda: load_dataset('eurosat', '../shared/real/dta'), 'does not exist', f"did you mean '{REAL/'data'}'?")
    says(lambda: load_dataset('eurosat', REAL/'data'/'eurosat'), 'pass the one above it')
    says(lambda: load_dataset('eurosat', REAL/'README.md'), 'is a file')
    says(lambda: load_dataset('oxford_pets', REAL/'data'), 'holds no folder oxford_pets')


# ---- a tree of our own under a real card

@pytest.fixture
def dtd(tmp_path):
    "Three images of each DTD class with a split that is not the published one."
    home, names = tmp_path/'dtd', [f'c_{i:02d}' for i in range(5)]
    tree(home/'images', dict.fromkeys(names, 3))
    lists = {p: [[f'{c}/{k}.png', l, c] for l, c in enumerate(names)] for k, p in enumerate(PARTS)}
    (home/'mine.json').write_text(json.dumps(lists))
    return tmp_path, home, lists

def test_missing_or_foreign_split_file(dtd):
    root, home, _ = dtd
    says(lambda: load_dataset('dtd', root), 'no split_zhou_DescribableTextures.json', "split='own'")
    shutil.copy(home/'mine.json', home/'split_zhou_DescribableTextures.json')
    says(lambda: load_dataset('dtd', root), 'is not the published file')
    ds = load_dataset('dtd', root, split='mine.json')
    assert ds.split_source == 'file' and ds.classes[0] == 'c 00' and 'sha256:' in ds.split_file and len(halves(ds)[0]) == 3
    own = load_dataset('dtd', root, split='own')
    assert own.split_source == 'own split' and (len(own.train), len(own.val), len(own.test)) == (5, 5, 5)

def test_split_file_of_ones_own_with_a_missing_image(dtd):
    root, home, _ = dtd
    (home/'images'/'c_01'/'2.png').unlink()
    says(lambda: load_dataset('dtd', root, split='mine.json'), '1 of the images', 'c_01/2.png')
    says(lambda: load_dataset('dtd', root, split='other.json'), 'the split file other.json does not exist')
    says(lambda: load_dataset('dtd', root, split='owm'), 'say auto, published, subset or own')

def test_a_read_only_tree_is_enough(dtd):
    root, home, _ = dtd
    for p in [*home.rglob('*'), home]: p.chmod(0o555 if p.is_dir() else 0o444)
    try: assert len(load_dataset('dtd', root, split='own').train[0].image.sha()) == 64
    finally:
        for p in [home, *home.rglob('*')]: p.chmod(0o755)

@pytest.mark.parametrize('change,words', [
    (lambda d: d['val'].append(d['train'][0]), 'names c_00/0.png 2 times'),
    (lambda d: d['val'].append(['c_09/0.png', 9, 'c_09']), 'and 5 is missing'),
    (lambda d: d['val'].append(['c_00/9.png', -1, 'c_00']), 'is missing'),
    (lambda d: d['val'].append(['../../etc/passwd', 0, 'c_00']), 'leads out of the image folder'),
    (lambda d: d['val'].append(['/etc/passwd', 0, 'c_00']), 'leads out of the image folder'),
    (lambda d: d['val'].append(['c_00/9.png', True, 'c_00']), 'an entry is [path, label, class name]'),
    (lambda d: d['val'].append(['c_00/9.png', 0]), 'an entry is [path, label, class name]'),
    (lambda d: d['val'].append(['c_00/9.png', 0, ' ']), 'an entry is [path, label, class name]'),
    (lambda d: d['val'].append(['c_00/9.png', 0, 'x']), "label 0 is called"),
    (lambda d: d.pop('test'), 'three lists called'),
    (lambda d: d.update(test=d['test'][1:]), "'c 00' of Describable Textures (DTD) has no test image"),
    (lambda d: [e.__setitem__(2, 'C 00') for p in PARTS for e in d[p] if e[1] == 1], "both called 'c 00'"),
])
def test_bad_split_files(dtd, change, words):
    root, home, lists = dtd
    change(lists); (home/'mine.json').write_text(json.dumps(lists))
    says(lambda: load_dataset('dtd', root, split='mine.json', check=False), words)

def test_split_file_that_is_no_json(dtd):
    root, home, _ = dtd
    for text in (b'', b'[1, 2', b'\xff\xfe', b'[]', b'{"train": 3}'):
        (home/'mine.json').write_bytes(text)
        says(lambda: load_dataset('dtd', root, split='mine.json'), 'mine.json')


# ---- folders of one's own

def test_folder_of_odd_names(tmp_path):
    names = ["colt's foot", 'caf\u00e9', 'a"b', '<b>x', 'ac_dc', '100']
    tree(tmp_path, dict.fromkeys(names, 4))
    (tmp_path/'class_names.json').write_text(json.dumps({'ac_dc': 'AC/DC', 'a"b': '<CLASS>'}))
    ds = load_dataset('folder', tmp_path)
    assert set(ds.classes) == {"colt's foot", 'caf\u00e9', '<CLASS>', '<b>x', 'AC/DC', '100'}
    html = ds._repr_html_()
    assert '<b>' not in html and '&lt;b&gt;' in html and 'own split' in html
    assert load_dataset('folder', tmp_path).split_sha == ds.split_sha

@pytest.mark.parametrize('text,words', [('ac: [1]', "lines of 'folder: class name'"), ('1: one', 'put quotes around numbers'), ('a: "', 'cannot be read'), ('antt: x', "did you mean 'ant'?"), ('ant: bee', "both called 'bee'")])
def test_bad_names_file(tmp_path, text, words):
    tree(tmp_path, dict(ant=2, bee=2, cow=2)); (tmp_path/'class_names.yaml').write_text(text)
    says(lambda: load_dataset('folder', tmp_path), words)

def test_folder_too_small(tmp_path):
    says(lambda: load_dataset('folder', tmp_path), 'holds no folders')
    tree(tmp_path, dict(ant=3)); says(lambda: load_dataset('folder', tmp_path), 'has 1 class')
    tree(tmp_path, dict(bee=1)); (tmp_path/'cow').mkdir()
    says(lambda: load_dataset('folder', tmp_path), "'bee' (1), 'cow' (0)", 'two images or more')
    says(lambda: load_dataset('folder'), 'pass data_root')

def test_class_with_one_training_image(tmp_path):
    tree(tmp_path/'train', dict(ant=1, bee=2)); tree(tmp_path/'test', dict(ant=1, bee=1), start=100)
    ds = load_dataset('folder', tmp_path)
    assert ds.split_source == 'as laid out' and len(few_shot(ds, 1, 1, 'all')) == 2
    says(lambda: few_shot(ds, 2, 1), "has 1 image of 'ant'")
    tree(tmp_path/'train', dict(cow=2)); says(lambda: load_dataset('folder', tmp_path), "'cow' of Your own images has no test image")

def test_a_class_called_train(tmp_path):
    tree(tmp_path, dict(car=3, train=3, plane=3))
    assert load_dataset('folder', tmp_path).classes == ['car', 'plane', 'train']

def test_hidden_and_other_files_are_left_out(tmp_path):
    tree(tmp_path, dict(ant=3, bee=3)); (tmp_path/'.git').mkdir(); (tmp_path/'ant'/'.DS_Store').touch(); (tmp_path/'ant'/'notes.txt').touch()
    ds = load_dataset('folder', tmp_path)
    assert len(ds.train + ds.val + ds.test) == 6 and ds.classes == ['ant', 'bee']


# ---- images

def test_damaged_images(tmp_path):
    path = tmp_path/'a.png'; Image.effect_noise((64, 64), 50).convert('RGB').save(path); whole = path.read_bytes()
    jpg = tmp_path/'a.jpg'; Image.effect_noise((64, 64), 50).convert('RGB').save(jpg); cut = jpg.read_bytes()[:-400]
    for b in (whole[:100], whole[:20], b'hello', whole[:50] + b'\0'*40 + whole[90:], cut):
        path.write_bytes(b); says(FileImage(str(path), 'a').open, 'a.png is damaged or no image', 'fetch it again')
    path.write_bytes(b''); says(FileImage(str(path), 'a').open, 'a.png is empty')
    path.unlink(); says(FileImage(str(path), 'a').open, 'cannot be read')

def test_images_of_other_modes_become_rgb(tmp_path):
    for mode in ('1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16'):
        path = tmp_path/'a.tif'; Image.new(mode, (3, 3)).save(path)
        assert FileImage(str(path), 'a').open().mode == 'RGB'
    assert FileImage(str(path), 'a').sha() == hashlib.sha256(path.read_bytes()).hexdigest()


# ---- few-shot samples

def test_golden_sample():
    ds = load_dataset('mini_objects')
    keys = [i.image.key for i in few_shot(ds, 1, 1)]
    def rank(seed, key): # core.sha, written out: each part framed by its length
        parts = [json.dumps(seed).encode(), json.dumps(key).encode()]
        return hashlib.sha256(b''.join(len(b).to_bytes(8, 'big') + b for b in parts)).hexdigest()
    n = len(ds.classes)
    want = [min((f'mini_objects/train/{i:06d}' for i in range(c, len(ds.train), n)), key=lambda k: rank(1, k)) for c in range((n + 1)//2)]
    assert keys == want
    assert rank(1, 'a/1.jpg')[:16] == 'f548d38b833e4036'

def test_samples_are_nested_and_free_of_global_state():
    ds = load_dataset('mini_textures')
    samples = {}
    for k in (16, 1, 8, 2, 4):
        random.seed(k); samples[k] = few_shot(ds, k, 2)
        assert items_sha(samples[k]) == items_sha(few_shot(load_dataset('mini_textures'), k, 2))
    for small, big in ((1, 2), (2, 4), (4, 8), (8, 16)): assert set(samples[small]) < set(samples[big])
    state = random.getstate(); few_shot(ds, 4, 3); assert random.getstate() == state
    assert len({items_sha(few_shot(ds, 1, s)) for s in (1, 2, 3)}) == 3
    assert {i.label for i in few_shot(ds, 1, 1, 'novel')} == set(range(ds.card.novel))

@pytest.mark.parametrize('shots', [0, -1, 1.5, '1', True, None])
def test_bad_shots(shots): says(lambda: few_shot(load_dataset('mini_aerial'), shots, 1), 'shots must be a whole number')

def test_more_shots_than_images(): says(lambda: few_shot(load_dataset('mini_aerial'), 17, 1), 'shots is 17', 'has 16 images', 'of mini_aerial')

def test_mini_datasets_load_and_shift_the_same_things():
    for name in MINI:
        ds = load_dataset(name)
        assert ds.split_source == 'generated' and ds.split_source in SPLIT_SOURCES and describe(ds)['generator']
        assert not {i.image.key for i in ds.train} & {i.image.key for i in ds.test}
        if ds.card.shift_of: assert ds.classes == load_dataset(ds.card.shift_of).classes
