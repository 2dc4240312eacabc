"Cards, real trees and bad input: what is no documentation and so stands beside the notebook."
import csv
import functools
import hashlib
import inspect
import json
import pickle
import random
import re
import shutil
from itertools import chain, product
from pathlib import Path
import pytest
from PIL import Image
from ipo_nb import data
from ipo_nb.core import IpoError, project_dir
from ipo_nb.data import (
    LAYOUTS,
    PARTS,
    SPLIT_SOURCES,
    FileImage,
    card_names,
    cards_table,
    describe,
    few_shot,
    halves,
    items_sha,
    load_card,
    load_dataset,
    original_labels,
    read_card,
    shifts,
    subset,
    synset_names,
    synsets,
)
from ipo_nb.miniworld import MINI, class_names, sizes

REAL = project_dir().parent/'shared'/'real'
real = pytest.mark.skipif(not REAL.exists(), reason='the real photographs (../shared/real) are not on this machine')
PAPER = ['caltech101', 'dtd', 'eurosat']
STUDY = dict( # CoOp's counts: classes, train, val, test, and its hand-written template
    imagenet=(1000, 1281167, 0, 50000, 'a photo of a <CLASS>.'),
    caltech101=(100, 4128, 1649, 2465, 'a photo of a <CLASS>.'),
    oxford_pets=(37, 2944, 736, 3669, 'a photo of a <CLASS>, a type of pet.'),
    stanford_cars=(196, 6509, 1635, 8041, 'a photo of a <CLASS>.'),
    oxford_flowers=(102, 4093, 1633, 2463, 'a photo of a <CLASS>, a type of flower.'),
    food101=(101, 50500, 20200, 30300, 'a photo of <CLASS>, a type of food.'),
    fgvc_aircraft=(100, 3334, 3333, 3333, 'a photo of a <CLASS>, a type of aircraft.'),
    sun397=(397, 15880, 3970, 19850, 'a photo of a <CLASS>.'),
    dtd=(47, 2820, 1128, 1692, '<CLASS> texture.'),
    eurosat=(10, 13500, 5400, 8100, 'a centered satellite photo of <CLASS>.'),
    ucf101=(101, 7639, 1898, 3783, 'a photo of a person doing <CLASS>.'),
    imagenetv2=(1000, 0, 0, 10000, 'a photo of a <CLASS>.'),
    imagenet_sketch=(1000, 0, 0, 50889, 'a photo of a <CLASS>.'),
    imagenet_a=(200, 0, 0, 7500, 'a photo of a <CLASS>.'),
    imagenet_r=(200, 0, 0, 30000, 'a photo of a <CLASS>.'))
IN_TORCHVISION = dict(food101='Food101', dtd='DTD', sun397='SUN397', oxford_flowers='Flowers102',
                      oxford_pets='OxfordIIITPet', eurosat='EuroSAT', caltech101='Caltech101')


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
        assert card.layout in LAYOUTS and card.prose
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
    def card(old, new):
        (tmp_path/'dtd.md').write_text(text.replace(old, new, 1))
        return lambda: read_card(tmp_path/'dtd.md')
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


@pytest.mark.parametrize('name', STUDY)
def test_cards_of_the_study(name):
    card = load_card(name)
    n, *counts, template = STUDY[name]
    assert (card.classes, card.base, card.novel) == (n, (n + 1)//2, n//2)
    assert card.splits == dict(zip(PARTS, counts)) and card.template == template
    assert '**By hand.**' in card.prose and '**Known flaws.**' in card.prose
    assert card.sources and card.metric == 'accuracy'
    listed = name not in ('imagenet', 'fgvc_aircraft', *shifts('imagenet'))
    assert bool(card.split_sha256) == bool(card.split_file) == listed
    pieces = {s.what for s in card.sources}
    assert ('split' in pieces) == bool(card.split_file) and ('images' in ' '.join(pieces)) == (name != 'imagenet')
    for s in card.sources:
        if s.what == 'split': assert s.checksum == f'sha256:{card.split_sha256}' and s.to == card.split_file
        if s.what in ('names', 'labels'): assert s.to
        if s.url.startswith('hf:'): assert re.search('@[0-9a-f]{40}$', s.url)

def test_checksums_are_those_of_torchvision():
    tv = pytest.importorskip('torchvision.datasets')
    for name, cls in IN_TORCHVISION.items():
        text = inspect.getsource(getattr(tv, cls))
        known = [s.checksum or '' for s in load_card(name).sources if s.what in ('images', 'labels')]
        md5 = {c[4:] for c in known if c.startswith('md5:')}
        assert md5 and all(m in text for m in md5), name
    assert all(m in load_card('imagenet').prose for _, m in inspect.getmodule(tv.ImageNet).ARCHIVE_META.values())

def test_index_of_cards_is_up_to_date():
    if not (project_dir()/'data_cards').exists(): pytest.skip('not a clone')
    path = project_dir()/'data_cards'/'README.md'
    anew = '''python -c "from ipo_nb.data import *; (cards_dir()/'README.md').write_text(cards_index())"'''
    assert path.read_text(encoding='utf-8') == data.cards_index(), f'write it anew: {anew}'

@pytest.mark.parametrize('old,new,words', [
    ('what: images', 'what: imagse', 'sources.'),
    ("url: 'https", "url: 'ftp", 'url'),
    ('md5:fff7', 'md5:xff7', 'checksum'),
    ('size: 625239812', 'sise: 625239812', "'sources.2.sise' is unknown; did you mean 'size'?"),
    ('layout: folder', 'layout: folder\nlabels: {fils: {}}', "did you mean 'files'?"),
    ('layout: folder', 'layout: folder\nlabels: {subset: imagenet_b}', 'labels.subset')])
def test_bad_sources_and_labels(tmp_path, old, new, words):
    text = (project_dir()/'data_cards'/'dtd.md').read_text()
    assert old in text
    (tmp_path/'dtd.md').write_text(text.replace(old, new, 1))
    says(lambda: read_card(tmp_path/'dtd.md'), words)


# ---- the real trees

@real
@pytest.mark.parametrize('name,counts,classes,base,first_novel', [
    ('eurosat', (400, 200, 1200), 10, 5, 'Pasture Land'),
    ('caltech101', (200, 100, 200), 100, 50, None),
    ('dtd', (20, 10, 40), 10, 5, 'chequered')])
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
        for i in few_shot(ds, 1, 1, 'all') + ds.test[::50]:
            assert i.image.open().mode == 'RGB' and len(i.image.sha()) == 64

@real
def test_eurosat_names_follow_from_its_folders():
    own = load_dataset('eurosat', REAL/'data', split='own', verbose=False)
    usual = load_dataset('eurosat', REAL/'data', verbose=False)
    assert own.split_source == 'own split' and own.classes == usual.classes

@real
@pytest.mark.parametrize('name,file', [
    ('oxford_flowers', 'split_zhou_OxfordFlowers.json'), ('oxford_pets', 'split_zhou_OxfordPets.json')])
def test_split_files_without_images(name, file, tmp_path):
    (tmp_path/name).mkdir()
    shutil.copy(REAL/'coop_splits'/file, tmp_path/name)
    ds = load_dataset(name, tmp_path, check=False)
    assert ds.split_source == 'published' and len(ds.classes) == ds.card.classes
    assert not any('_' in c for c in ds.classes)
    says(lambda: load_dataset(name, tmp_path), 'are missing from')
    lacking = 'there is no cat_to_name.json' if name == 'oxford_flowers' else 'images'
    says(lambda: load_dataset(name, tmp_path, split='own'), lacking)
    if name == 'oxford_flowers': assert "colt's foot" in halves(ds)[0] and ds.classes[0] == 'pink primrose'

INDICES = sorted((REAL/'coop_splits'/'indices').glob('*/*.json')) # none where the real photographs are not here
NO_LISTS = pytest.param(None, marks=pytest.mark.skip(
    reason='the published few-shot lists (../shared/real) are not on this machine'))

@pytest.mark.parametrize('path', INDICES or [NO_LISTS], ids=lambda p: p and f'{p.parent.name}-{p.stem}')
def test_published_few_shot_lists(path):
    ds, (shots, seed) = lists(path.parent.name), map(int, re.findall(r'\d+', path.stem))
    published = json.loads(path.read_text())['train']['data']
    def key(e): return e['impath'].split(ds.card.images + '/')[1]
    random.seed(99)
    drawn = few_shot(ds, shots, seed, 'all')
    assert [(i.image.key, i.label) for i in drawn] == [(key(e), e['label']) for e in published]
    got = few_shot(ds, shots, seed, index=path)
    assert got == few_shot(ds, shots, seed) and len(got) == shots*ds.card.base
    old = few_shot(ds, shots, seed, draw='hash', index=path)
    assert old != got or shots == 1
    assert set(old) == set(got) != set(few_shot(ds, shots, seed, draw='hash'))
    says(lambda: few_shot(ds, shots + 1, seed, index=path), f'shots is {shots + 1}')

@real
def test_all_published_lists_are_held(): # 1, 2, 4, 8 and 16 shots, seeds 1 to 3
    assert len(INDICES) == 30

@real
def test_a_subset_is_drawn_from_its_own_list():
    part, whole = load_dataset('eurosat', REAL/'data', verbose=False), lists('eurosat')
    assert part.split_source == 'subset'
    mine = {c: [i for i in part.train if i.name == c] for c in part.classes}
    rng = random.Random(2)
    wanted = [i for c in dict.fromkeys(i.name for i in part.train) for i in rng.sample(mine[c], 4)]
    assert few_shot(part, 4, 2, 'all') == wanted != few_shot(whole, 4, 2, 'all')

@real
def test_classes_are_drawn_in_the_order_of_the_list(tmp_path): # Flowers' is not sorted by label
    (tmp_path/'oxford_flowers').mkdir()
    shutil.copy(REAL/'coop_splits'/'split_zhou_OxfordFlowers.json', tmp_path/'oxford_flowers')
    ds, rng, drawn = load_dataset('oxford_flowers', tmp_path, check=False), random.Random(3), {}
    order = list(dict.fromkeys(i.label for i in ds.train))
    assert order != sorted(order)
    for label in order: drawn[label] = rng.sample([i for i in ds.train if i.label == label], 2)
    assert few_shot(ds, 2, 3) == [*chain.from_iterable(drawn[label] for label in range(ds.card.base))]

@real
def test_published_list_of_other_images_is_refused():
    ds = load_dataset('dtd', REAL/'data', verbose=False)
    foreign = REAL/'coop_splits'/'indices'/'eurosat'/'shot_1-seed_1.json'
    says(lambda: few_shot(ds, 1, 1, index=foreign), 'not in the training list')
    says(lambda: few_shot(ds, 1, 1, index=REAL/'README.md'), 'is no few-shot index')
    says(lambda: few_shot(ds, 1, 1, index=REAL/'READMI.md'), 'does not exist', 'README.md')

@real
def test_data_root_mistakes():
    says(lambda: load_dataset('eurosat'), 'pass data_root')
    says(lambda: load_dataset('eurosat', REAL/'dat'), 'does not exist', f"did you mean '{REAL/'data'}'?")
    near = (REAL/'data').resolve()
    says(lambda: load_dataset('eurosat', '../shared/real/dta'), 'does not exist', f"did you mean '{near}'?")
    says(lambda: load_dataset('eurosat', REAL/'data'/'eurosat'), 'pass the one above it')
    says(lambda: load_dataset('eurosat', REAL/'README.md'), 'is a file')
    says(lambda: load_dataset('oxford_pets', REAL/'data'), 'holds no folder oxford_pets')


# ---- a tree of our own under a real card

@pytest.fixture
def dtd(tmp_path):
    "Three images of each DTD class with a split that is not the published one."
    home, names = tmp_path/'dtd', [f'c_{i:02d}' for i in range(5)]
    tree(home/'images', dict.fromkeys(names, 3))
    def entries(k): return [[f'{c}/{k}.png', l, c] for l, c in enumerate(names)]
    lists = {p: entries(k) for k, p in enumerate(PARTS)}
    (home/'mine.json').write_text(json.dumps(lists))
    return tmp_path, home, lists

def test_missing_or_foreign_split_file(dtd):
    root, home, _ = dtd
    says(lambda: load_dataset('dtd', root), 'no split_zhou_DescribableTextures.json', "split='own'")
    shutil.copy(home/'mine.json', home/'split_zhou_DescribableTextures.json')
    says(lambda: load_dataset('dtd', root), 'is not the published file')
    ds = load_dataset('dtd', root, split='mine.json')
    assert ds.split_source == 'file' and 'sha256:' in ds.split_file
    assert ds.classes[0] == 'c 00' and len(halves(ds)[0]) == 3
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
    change(lists)
    (home/'mine.json').write_text(json.dumps(lists))
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

@pytest.mark.parametrize('text,words', [
    ('ac: [1]', "lines of 'folder: class name'"), ('1: one', 'put quotes around numbers'), ('a: "', 'cannot be read'),
    ('antt: x', "did you mean 'ant'?"), ('ant: bee', "both called 'bee'")])
def test_bad_names_file(tmp_path, text, words):
    tree(tmp_path, dict(ant=2, bee=2, cow=2))
    (tmp_path/'class_names.yaml').write_text(text)
    says(lambda: load_dataset('folder', tmp_path), words)

def test_folder_too_small(tmp_path):
    says(lambda: load_dataset('folder', tmp_path), 'holds no folders')
    tree(tmp_path, dict(ant=3))
    says(lambda: load_dataset('folder', tmp_path), 'has 1 class')
    tree(tmp_path, dict(bee=1))
    (tmp_path/'cow').mkdir()
    says(lambda: load_dataset('folder', tmp_path), "'bee' (1), 'cow' (0)", 'two images or more')
    says(lambda: load_dataset('folder'), 'pass data_root')

def test_class_with_one_training_image(tmp_path):
    tree(tmp_path/'train', dict(ant=1, bee=2))
    tree(tmp_path/'test', dict(ant=1, bee=1), start=100)
    ds = load_dataset('folder', tmp_path)
    assert ds.split_source == 'as laid out' and len(few_shot(ds, 1, 1, 'all')) == 2
    says(lambda: few_shot(ds, 2, 1), "has 1 image of 'ant'")
    tree(tmp_path/'train', dict(cow=2))
    says(lambda: load_dataset('folder', tmp_path), "'cow' of Your own images has no test image")

def test_a_class_called_train(tmp_path):
    tree(tmp_path, dict(car=3, train=3, plane=3))
    assert load_dataset('folder', tmp_path).classes == ['car', 'plane', 'train']

def test_a_division_that_was_only_begun(tmp_path):
    tree(tmp_path/'train', dict(ant=3, bee=3))
    says(lambda: load_dataset('folder', tmp_path), 'holds train with class folders', 'add the other')
    tree(tmp_path/'valid', dict(ant=3, bee=3))
    assert load_dataset('folder', tmp_path).split_source == 'as laid out'
    tree(tmp_path/'two'/'test', dict(ant=3, bee=3))
    says(lambda: load_dataset('folder', tmp_path/'two'), 'holds test with class folders')

def test_a_folder_without_a_name(tmp_path):
    tree(tmp_path, dict(_=3, bee=3))
    says(lambda: load_dataset('folder', tmp_path), 'has an empty name')

def test_images_sha_knows_other_pictures_under_the_same_names(tmp_path):
    tree(tmp_path, dict(ant=4, bee=4))
    ds = load_dataset('folder', tmp_path, verbose=False)
    few = few_shot(ds, 1, 1, 'all')
    before = data.images_sha(few), data.images_sha(ds.test, whole=False)
    path = Path(few[0].image.path)
    Image.open(path).resize((3, 7)).save(path)
    assert data.images_sha(few) != before[0] and data.images_sha(ds.test, whole=False) == before[1]
    path = Path(ds.test[0].image.path)
    path.write_bytes(path.read_bytes() + b' ')
    assert data.images_sha(ds.test, whole=False) != before[1]
    path.unlink()
    says(lambda: data.images_sha(ds.test), 'cannot be read')
    says(lambda: data.images_sha(ds.test, whole=False), 'cannot be read')
    mini = load_dataset('mini_aerial').test[:3]
    assert data.images_sha(mini) == data.images_sha(mini, whole=False)

def test_hidden_and_other_files_are_left_out(tmp_path):
    tree(tmp_path, dict(ant=3, bee=3))
    (tmp_path/'.git').mkdir()
    (tmp_path/'ant'/'.DS_Store').touch()
    (tmp_path/'ant'/'notes.txt').touch()
    ds = load_dataset('folder', tmp_path)
    assert len(ds.train + ds.val + ds.test) == 6 and ds.classes == ['ant', 'bee']


# ---- images

def test_damaged_images(tmp_path):
    path = tmp_path/'a.png'
    Image.effect_noise((64, 64), 50).convert('RGB').save(path)
    whole = path.read_bytes()
    jpg = tmp_path/'a.jpg'
    Image.effect_noise((64, 64), 50).convert('RGB').save(jpg)
    cut = jpg.read_bytes()[:-400]
    for b in (whole[:100], whole[:20], b'hello', whole[:50] + b'\0'*40 + whole[90:], cut):
        path.write_bytes(b)
        says(FileImage(str(path), 'a').open, 'a.png is damaged or no image', 'fetch it again')
    path.write_bytes(b'')
    says(FileImage(str(path), 'a').open, 'a.png is empty')
    path.unlink()
    says(FileImage(str(path), 'a').open, 'cannot be read')

def test_images_travel_to_worker_processes():
    images = FileImage('/x/a.jpg', 'a.jpg'), load_dataset('mini_aerial').train[0]
    for i in images: assert pickle.loads(pickle.dumps(i)) == i

def test_images_of_other_modes_become_rgb(tmp_path):
    for mode in ('1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16'):
        path = tmp_path/'a.tif'
        Image.new(mode, (3, 3)).save(path)
        assert FileImage(str(path), 'a').open().mode == 'RGB'
    assert FileImage(str(path), 'a').sha() == hashlib.sha256(path.read_bytes()).hexdigest()


# ---- few-shot samples

def test_golden_sample():
    ds, rng = load_dataset('mini_objects'), random.Random(1)
    n = len(ds.classes)
    want = [f'mini_objects/train/{rng.sample(range(c, len(ds.train), n), 1)[0]:06d}' for c in range(n)]
    assert [i.image.key for i in few_shot(ds, 1, 1, 'all')] == want # every n-th image is of one class
    assert want[:2] == ['mini_objects/train/000084', 'mini_objects/train/000043']

def test_golden_sample_of_the_draw_of_0_1_0():
    ds = load_dataset('mini_objects')
    keys = [i.image.key for i in few_shot(ds, 1, 1, draw='hash')]
    def rank(seed, key): # core.sha, written out: each part framed by its length
        parts = [json.dumps(seed).encode(), json.dumps(key).encode()]
        return hashlib.sha256(b''.join(len(b).to_bytes(8, 'big') + b for b in parts)).hexdigest()
    n = len(ds.classes)
    def first(c): # of one class by rank: every n-th image is of the class
        return min((f'mini_objects/train/{i:06d}' for i in range(c, len(ds.train), n)), key=lambda k: rank(1, k))
    want = [first(c) for c in range((n + 1)//2)]
    assert keys == want
    assert rank(1, 'a/1.jpg')[:16] == 'f548d38b833e4036'

@pytest.mark.parametrize('draw', ['coop', 'hash'])
def test_samples_are_free_of_global_state(draw):
    ds = load_dataset('mini_textures')
    samples = {}
    for k in (16, 1, 8, 2, 4):
        random.seed(k)
        samples[k] = few_shot(ds, k, 2, draw=draw)
        assert items_sha(samples[k]) == items_sha(few_shot(load_dataset('mini_textures'), k, 2, draw=draw))
    nested = [set(samples[k]) < set(samples[2*k]) for k in (1, 2, 4, 8)]
    assert all(nested) == (draw == 'hash')
    state = random.getstate()
    few_shot(ds, 4, 3, draw=draw)
    assert random.getstate() == state
    assert len({items_sha(few_shot(ds, 1, s, draw=draw)) for s in (1, 2, 3)}) == 3
    assert {i.label for i in few_shot(ds, 1, 1, 'novel', draw=draw)} == set(range(ds.card.novel))

def test_a_class_with_too_few_images_is_drawn_around(tmp_path):
    "What the other half lacks is no matter, and as in CoOp's code it takes no random number."
    tree(tmp_path/'train', dict(ant=4, bee=4, cat=1, dog=4))
    tree(tmp_path/'test', dict.fromkeys(('ant', 'bee', 'cat', 'dog'), 1), 100)
    ds = load_dataset('folder', tmp_path, verbose=False)
    assert len(few_shot(ds, 2, 1)) == 4
    says(lambda: few_shot(ds, 2, 1, 'novel'), "has 1 image of 'cat'")
    says(lambda: few_shot(ds, 2, 1, 'nowel'), "did you mean 'novel'?")
    says(lambda: few_shot(ds, 2, 1, draw='dice'), "no draw called 'dice'")

@pytest.mark.parametrize('n', [1, 4, 6, 7, 13, 96, 0])
def test_described_images_go_round_the_classes(n):
    few = few_shot(load_dataset('mini_objects'), 16, 1)
    some = data.balanced(few, n, 1)
    counts = [sum(i.label == c for i in some) for c in {i.label for i in few}]
    assert len(some) == min(n or len(few), len(few)) and max(counts) - min(counts) <= 1
    assert some == [i for i in few if i in some]
    assert set(some) <= set(data.balanced(few, n + 5 if n else 0, 1))

@pytest.mark.parametrize('shots', [0, -1, 1.5, '1', True, None])
def test_bad_shots(shots): says(lambda: few_shot(load_dataset('mini_aerial'), shots, 1), 'shots must be a whole number')

def test_more_shots_than_images():
    says(lambda: few_shot(load_dataset('mini_aerial'), 17, 1), 'shots is 17', 'has 16 images', 'of mini_aerial')

def test_mini_datasets_load_and_shift_the_same_things():
    for name in MINI:
        ds = load_dataset(name)
        assert ds.split_source == 'generated' and ds.split_source in SPLIT_SOURCES and describe(ds)['generator']
        assert not {i.image.key for i in ds.train} & {i.image.key for i in ds.test}
        if ds.card.shift_of: assert ds.classes == load_dataset(ds.card.shift_of).classes


# ---- the readers, on trees of our own under the real cards

def touched(root, *paths):
    for p in paths:
        (root/p).parent.mkdir(parents=True, exist_ok=True)
        (root/p).write_bytes(p.encode())
    return root

@pytest.fixture
def cards(monkeypatch):
    "Change a real card for a test: `cards('dtd', classes=2, ...)`."
    real = data.load_card
    def change(name, **kw):
        card = real(name).model_copy(update=kw)
        monkeypatch.setattr(data, 'load_card', lambda n: card if n == name else real(n))
        return card
    return change

def test_aircraft_lists(tmp_path, cards):
    home = tmp_path/'fgvc_aircraft'
    home.mkdir()
    names = ['707-320', 'F/A-18', 'Boeing 717']
    (home/'variants.txt').write_text('\n'.join(names))
    for k, p in enumerate(PARTS):
        lines = [f'{k}{i} {n}\n' for i, n in enumerate(names)]
        (home/f'images_variant_{p}.txt').write_text(''.join(lines))
    touched(home/'images', *(f'{k}{i}.jpg' for k in range(3) for i in range(3)))
    says(lambda: load_dataset('fgvc_aircraft', tmp_path), 'variants.txt is not the published file')
    labels = load_card('fgvc_aircraft').labels.model_copy(update=dict(sha256={}))
    cards('fgvc_aircraft', labels=labels)
    says(lambda: load_dataset('fgvc_aircraft', tmp_path),
         'holds 3 train, 3 val and 3 test images of 3 classes, and fgvc_aircraft has 3,334 train')
    cards('fgvc_aircraft', labels=labels, splits=dict(train=3, val=3, test=3), classes=3, base=2, novel=1)
    ds = load_dataset('fgvc_aircraft', tmp_path)
    assert (ds.split_source, ds.classes, ds.test[1].image.key) == ('published', names, '21.jpg')
    assert ds.split_file.count('sha256:') == 3
    says(lambda: load_dataset('fgvc_aircraft', tmp_path, split='own'), 'leave split alone')
    (home/'images'/'00.jpg').unlink()
    says(lambda: load_dataset('fgvc_aircraft', tmp_path), '00.jpg is missing', 'ipo_data check')
    part = load_dataset('fgvc_aircraft', tmp_path, split='subset', verbose=False)
    assert part.split_source == 'subset' and len(part.train) == 2 and 'not comparable' in part.note
    (home/'images_variant_test.txt').write_text('20 707-330\n')
    nearest = "did you mean '707-320'?"
    says(lambda: load_dataset('fgvc_aircraft', tmp_path), 'line 1 of images_variant_test.txt', nearest)
    (home/'images_variant_test.txt').unlink()
    says(lambda: load_dataset('fgvc_aircraft', tmp_path), 'there is no images_variant_test.txt')

def test_own_splits_of_published_sets(tmp_path):
    from scipy.io import savemat
    def four(pattern, *classes): return [pattern.format(c, i) for c in classes for i in range(4)]
    touched(tmp_path/'oxford_pets'/'images', *four('{}_{}.jpg', 'Abyssinian', 'boxer', 'Bengal'))
    pets = load_dataset('oxford_pets', tmp_path, split='own', verbose=False)
    assert (pets.classes, pets.split_source) == (['abyssinian', 'bengal', 'boxer'], 'own split')
    sun = four('{}/sun_{}.jpg', 'a/abbey', 'c/church/indoor', 'c/church/outdoor')
    touched(tmp_path/'sun397'/'SUN397', *sun)
    places = load_dataset('sun397', tmp_path, split='own', verbose=False)
    assert places.classes == ['abbey', 'indoor church', 'outdoor church']
    touched(tmp_path/'ucf101'/'UCF-101-midframes', *four('{}/v_{}.jpg', 'Apply_Eye_Makeup', 'Yo_Yo'))
    assert load_dataset('ucf101', tmp_path, split='own', verbose=False).classes == ['Apply Eye Makeup', 'Yo Yo']
    home = tmp_path/'stanford_cars'
    (home/'devkit').mkdir(parents=True)
    rows = lambda k: [{'fname': f'{i}.jpg', 'class': 1 + i % 2} for i in range(4)]
    savemat(home/'devkit'/'cars_meta.mat', dict(class_names=['Audi TTS Coupe 2012', 'Ford GT 2006']))
    savemat(home/'devkit'/'cars_train_annos.mat', dict(annotations=rows(0)))
    savemat(home/'cars_test_annos_withlabels.mat', dict(annotations=rows(1)))
    says(lambda: load_dataset('stanford_cars', tmp_path, split='own'), 'is not the published file')

def test_cars_and_flowers_from_matlab_files(tmp_path, cards):
    from scipy.io import savemat
    home = tmp_path/'stanford_cars'
    (home/'devkit').mkdir(parents=True)
    savemat(home/'devkit'/'cars_meta.mat', dict(class_names=['Audi TTS Coupe 2012', 'Ford GT 2006']))
    rows = [{'fname': f'{i}.jpg', 'class': 1 + i % 2} for i in range(4)]
    for f in ('devkit/cars_train_annos.mat', 'cars_test_annos_withlabels.mat'):
        savemat(home/f, dict(annotations=rows))
    card = load_card('stanford_cars')
    cards('stanford_cars', labels=card.labels.model_copy(update=dict(sha256={})))
    says(lambda: load_dataset('stanford_cars', tmp_path, split='own'),
         '8 of the 8 images that the labels of stanford_cars name are missing', 'for example cars_t')
    touched(home, *(f'{d}/{i}.jpg' for d, i in product(('cars_train', 'cars_test'), range(4))))
    ds = load_dataset('stanford_cars', tmp_path, split='own', verbose=False)
    assert ds.classes == ['2012 Audi TTS Coupe', '2006 Ford GT']
    assert {i.image.key.split('/')[0] for i in ds.train + ds.val + ds.test} == {'cars_train', 'cars_test'}
    for bad in (b'', b'MATLAB 5.0 MAT-file', b'no'):
        (home/'devkit'/'cars_meta.mat').write_bytes(bad)
        says(lambda: load_dataset('stanford_cars', tmp_path, split='own'), 'MATLAB')

@pytest.mark.parametrize('text,words', [
    ('a,b\n1.png,ant\n', 'the columns image and class'),
    ('', 'the columns image and class'),
    ('image,class\n1.png,\n', 'line 2'),
    ('image,class,split\n1.png,ant,dev\n', 'a split of train, val or test'),
    ('image,class\n../1.png,ant\n', 'leads out'),
    ('image,class\n1.png,ant\n1.png,bee\n', 'names 1.png 2 times'),
    ('image,class\n1.png,ant\n2.png,bee\n', 'too small to split')])
def test_bad_csv(tmp_path, text, words):
    (tmp_path/'labels.csv').write_text(text)
    says(lambda: load_dataset('folder', tmp_path), words)

def test_csv(tmp_path):
    classes, parts = ('ant', 'AC, "DC"'), ('train', 'train', 'test')
    rows = [(f'{k}{i}.png', c, p) for k, c in enumerate(classes) for i, p in enumerate(parts)]
    with open(tmp_path/'labels.csv', 'w', newline='', encoding='utf-8-sig') as f:
        csv.writer(f).writerows([('image', 'class', 'split'), *rows])
    touched(tmp_path, *(r[0] for r in rows))
    ds = load_dataset('folder', tmp_path, verbose=False)
    (tmp_path/'00.png').unlink()
    says(lambda: load_dataset('folder', tmp_path), '1 of the 6 images', 'for example 00.png')
    assert (ds.classes, ds.split_source, len(ds.train), len(ds.test)) == (['AC, "DC"', 'ant'], 'as laid out', 4, 2)


# ---- ImageNet and its shifts

@pytest.fixture
def imagenet(tmp_path):
    "All 1,000 folders with one training and one validation image."
    names = [f'{d}/{w}/{i}' for w in synsets() for d, i in (('train', f'{w}_1'), ('val', 'ILSVRC2012_val_1'))]
    touched(tmp_path/'imagenet'/'images', *(f'{n}.JPEG' for n in names))
    return tmp_path

def test_imagenet(imagenet, cards):
    says(lambda: load_dataset('imagenet', imagenet), "split='subset'",
         'holds 1,000 train, 0 val and 1,000 test images of 1,000 classes, and imagenet has 1,281,167 train')
    part = load_dataset('imagenet', imagenet, split='subset', verbose=False)
    assert part.split_source == 'subset' and len(part.classes) == 1000
    cards('imagenet', splits=dict(train=1000, val=0, test=1000))
    ds = load_dataset('imagenet', imagenet)
    assert ds.split_source == 'published' and 'open_clip' in ds.split_file
    assert "two classes each are called 'missile' and 'sunglasses'" in ds.note
    base, novel = halves(ds)
    assert (len(base), len(novel), base[0], base[134]) == (500, 500, 'tench', 'crane bird')
    assert novel[17] == 'construction crane'
    assert len(few_shot(ds, 1, 1)) == 500 and {i.label for i in subset(ds.test, 'novel', ds)} == set(range(500))
    assert ds.test[0].image.key == 'val/n01440764/ILSVRC2012_val_1.JPEG'

def test_imagenet_names_file(imagenet, cards):
    cards('imagenet', splits=dict(train=1000, val=0, test=1000))
    path = imagenet/'imagenet'/'classnames.txt'
    path.write_text('\n'.join(f'{w} name of {w}' for w in synsets()))
    ds = load_dataset('imagenet', imagenet)
    assert ds.classes[0] == 'name of n01440764' and 'As published' not in ds.note
    assert ds.split_file.startswith('classnames.txt sha256:')
    shifted, _ = synset_names(imagenet/'imagenet-adversarial')
    assert shifted['n01440764'] == 'name of n01440764' # the shifts use ImageNet's
    path.write_text('\n'.join(f'{w} thing' for w in synsets()))
    says(lambda: load_dataset('imagenet', imagenet), "both called 'thing'")
    path.write_text('\n'.join(f'{w} {w}' for w in synsets()[1:]))
    says(lambda: load_dataset('imagenet', imagenet), '1 of the 1,000 are missing, for example n01440764')
    path.write_bytes(b'\xff\xfe')
    says(lambda: load_dataset('imagenet', imagenet), 'is no text file')

def test_imagenet_mistakes(imagenet):
    val = imagenet/'imagenet'/'images'/'val'
    (val/'n99999999').mkdir()
    says(lambda: load_dataset('imagenet', imagenet), 'n99999999 is no class of imagenet')
    shutil.rmtree(val)
    touched(val, 'ILSVRC2012_val_00000001.JPEG')
    says(lambda: load_dataset('imagenet', imagenet), 'holds 1 images and no folders', 'data_cards/imagenet.md')
    shutil.rmtree(val)
    says(lambda: load_dataset('imagenet', imagenet), 'there is no folder')
    says(lambda: load_dataset('imagenet', imagenet, split='own'), 'there is no folder')

def test_a_part_of_imagenet(tmp_path):
    images = [f'{d}/{w}/{i}.JPEG' for w, d, i in product(synsets()[5:9], ('train', 'val'), 'ab')]
    touched(tmp_path/'imagenet'/'images', *images)
    ds = load_dataset('imagenet', tmp_path, split='subset', verbose=False)
    assert ds.classes == ['electric ray', 'stingray', 'rooster', 'hen'] and '1,000 classes' in ds.note
    assert {i.label for i in ds.train} == {0, 1, 2, 3}

@pytest.mark.parametrize('name,folder,n', [
    ('imagenet_a', 'imagenet-adversarial/imagenet-a', 200), ('imagenet_r', 'imagenet-rendition/imagenet-r', 200),
    ('imagenet_sketch', 'imagenet-sketch/images', 1000),
    ('imagenetv2', 'imagenetv2/imagenetv2-matched-frequency-format-val', 1000)])
def test_shifts_of_imagenet(name, folder, n, tmp_path, cards):
    ids = synsets(load_card(name).labels.subset)
    touched(tmp_path/folder, *(f'{k if name == "imagenetv2" else w}/x.jpg' for k, w in enumerate(ids)), 'README.txt')
    cards(name, splits=dict(train=0, val=0, test=n))
    ds = load_dataset(name, tmp_path)
    names, at = synset_names(tmp_path/'x')[0], original_labels(name)
    assert ds.split_source == 'published' and len(ds.classes) == n == len(at) and not ds.train
    assert ds.classes == [names[synsets()[k]] for k in at] # label by label the class of the original
    if name == 'imagenetv2': assert [i.image.key.split('/')[0] for i in ds.test] == [str(k) for k in range(1000)]
    says(lambda: few_shot(ds, 1, 1), 'no training images', 'search on imagenet')
    json.dumps(describe(ds))

def test_the_two_subsets_differ():
    a, r = set(original_labels('imagenet_a')), set(original_labels('imagenet_r'))
    assert len(a) == len(r) == 200 and a != r
    assert 'n01443537' in synsets('imagenet_r') and 'n01443537' not in synsets('imagenet_a')

def test_images_of_another_shift_are_refused(tmp_path):
    touched(tmp_path/'imagenet-adversarial'/'imagenet-a', *(f'{w}/x.jpg' for w in synsets('imagenet_r')))
    says(lambda: load_dataset('imagenet_a', tmp_path), 'is no class of imagenet_a')

def test_shifts_of_the_miniworld():
    assert shifts('mini_objects') == sorted(n for n in MINI if n.startswith('mini_objects_'))
    assert set(shifts()) == {*shifts('mini_objects'), *shifts('imagenet')}
    says(lambda: original_labels('eurosat'), 'is no shifted version')
