"Downloads from a host in bad moods, archives of bad intent, and the doctor on whole, partial and broken trees."
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
import pytest
from fastcore.script import anno_parser
from PIL import Image
from ipo_nb import data, download
from ipo_nb.core import IpoError, project_dir
from ipo_nb.data import PARTS, Source, load_card, load_dataset
from ipo_nb.download import check, fetch, get, list_text, main, report_text, unpack

REAL = project_dir().parent/'shared'/'real'
real = pytest.mark.skipif(not REAL.exists(), reason='the real photographs (../shared/real) are not on this machine')
BODY = bytes(i*i % 251 for i in range(300_000))
SHA = 'sha256:' + hashlib.sha256(BODY).hexdigest()


def says(fn, *words):
    "The one sentence with which `fn` refuses."
    with pytest.raises(IpoError) as e: fn()
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text
    return text


def script(*argv):
    "The exit status of `ipo_data` with these words."
    asked = anno_parser(main, 'ipo_data').parse_args(argv)
    return main(asked.command, asked.rest)


class Host(http.server.BaseHTTPRequestHandler):
    "The first part of a path is the mood, the rest names the body."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def end(self, **headers):
        for name, value in headers.items(): self.send_header(name.replace('_', '-'), value)
        self.end_headers()
    def answer(self, code, body=b'', start=0, total=None, tag='"v1"', kind='application/octet-stream',
               end=None, pause=0):
        self.send_response(code)
        if code == 206: self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        if tag: self.send_header('ETag', tag)
        self.end(Content_Type=kind, Content_Length=str(len(body) - start if total is None else total))
        for i in range(start, len(body) if end is None else min(end, len(body)), 20_000):
            self.wfile.write(body[i:min(i + 20_000, end or len(body))])
            self.wfile.flush()
            threading.Event().wait(pause)
        self.close_connection = True
    def do_GET(self):
        mood, _, name = self.path[1:].partition('/')
        s, body, rng = self.server, self.server.bodies.get(name), self.headers.get('Range')
        start = int(rng[6:].split('-')[0]) if rng else 0
        s.log.append((mood, start))
        n = sum(m == mood for m, _ in s.log)
        ranged = lambda **kw: self.answer(206 if rng else 200, body, start, **kw)
        if mood == 'redirect':
            self.send_response(302)
            self.end(Location=f'/ok/{name}', Content_Length='0')
        elif mood == 'loop':
            self.send_response(302)
            self.end(Location=self.path, Content_Length='0')
        elif mood == 'gone': self.answer(404)
        elif mood == 'busy': self.answer(503) if n < 3 else ranged()
        elif mood == 'page': self.answer(200, b'<html>please sign in</html>', kind='text/html; charset=utf-8')
        elif mood == 'breaks': ranged(end=start + 100_000)
        elif mood == 'breaks_without_ranges': self.answer(200, body, end=100_000*n, tag='')
        elif mood == 'never': self.answer(200, body, end=0)
        elif mood == 'stuck': self.answer(200, body, end=50_000)
        elif mood == 'slow': ranged(pause=.05)
        elif mood == 'stalls': ranged() if n > 1 else (self.answer(200, body, end=100_000), threading.Event().wait(3))
        elif mood == 'changed': # another version after the first answer: If-Range does not match
            self.answer(200, body, tag=f'"v{n}"', end=100_000 if n == 1 else None)
        elif mood == 'liar': # the rest is of another file
            if rng: self.answer(206, bytes(len(body)), start, end=100_000 if n == 1 else None)
            else: self.answer(200, body, start, end=100_000 if n == 1 else None)
        elif mood == 'ended':
            self.send_response(416)
            self.end(Content_Range=f'bytes */{len(body)}', Content_Length='0')
        else: ranged()

@pytest.fixture
def host(monkeypatch):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Host)
    server.bodies, server.log = {'a.bin': BODY}, []
    server.url = lambda mood, name='a.bin': f'http://127.0.0.1:{server.server_address[1]}/{mood}/{name}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()

def source(url, checksum=SHA, what='images', **kw): return Source(what=what, url=url, checksum=checksum, **kw)


# ---- one file

@pytest.mark.parametrize('mood,starts', [
    ('ok', [0]), ('breaks', [0, 100_000, 200_000]), ('breaks_without_ranges', [0, 100_000, 200_000]),
    ('busy', [0, 0, 0]), ('slow', [0]), ('changed', [0, 100_000]), ('liar', [0, 100_000, 0])])
def test_moods_that_end_well(host, tmp_path, mood, starts):
    path, record = fetch([source(host.url(mood))], tmp_path, timeout=5)
    assert path.read_bytes() == BODY and record['checked'] and record['sha256'] == SHA[7:]
    assert [s for _, s in host.log] == starts

def test_redirect(host, tmp_path):
    path, _ = fetch([source(host.url('redirect'))], tmp_path)
    assert path.read_bytes() == BODY and host.log == [('redirect', 0), ('ok', 0)]

@pytest.mark.parametrize('mood,words', [
    ('gone', 'answered HTTP 404'), ('loop', 'cannot be asked'), ('page', 'a web page instead of the file'),
    ('never', 'broke off 4 times at 0 bytes'), ('stuck', 'broke off 4 times at 50,000 bytes')])
def test_moods_that_do_not(host, tmp_path, mood, words, monkeypatch):
    monkeypatch.setattr(download.time, 'sleep', lambda s: None)
    says(lambda: fetch([source(host.url(mood))], tmp_path, timeout=5), 'images cannot be had', host.url(mood), words)

def test_a_host_that_stalls_is_asked_again(host, tmp_path):
    t = time.time()
    assert fetch([source(host.url('stalls'))], tmp_path, timeout=.5)[0].read_bytes() == BODY
    assert time.time() - t < 8 and host.log[1] == ('stalls', 100_000)

def test_a_dead_host(tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, 'sleep', lambda s: None)
    nobody = source('http://127.0.0.1:9/x')
    says(lambda: fetch([nobody], tmp_path, timeout=2), 'broke off 4 times at 0 bytes', 'ConnectError')

def test_wrong_bytes_are_not_kept(host, tmp_path):
    wrong = 'md5:' + '0'*32
    says(lambda: fetch([source(host.url('ok'), wrong)], tmp_path), 'wrong bytes')
    assert not list(tmp_path.glob('*.part'))

def test_sizes(host, tmp_path):
    says(lambda: fetch([source(host.url('ok'), None, size=5)], tmp_path), 'offers 300,000 bytes instead of 5')
    assert not fetch([source(host.url('ok'), None, size=len(BODY))], tmp_path)[1]['checked']

def test_sources_in_order(host, tmp_path):
    path, record = fetch([source(host.url(mood)) for mood in ('gone', 'page', 'redirect', 'ok')], tmp_path)
    assert record['url'] == host.url('redirect') and [m for m, _ in host.log] == ['gone', 'page', 'redirect', 'ok']
    text = says(lambda: fetch([source(host.url('gone')), source(host.url('page'))], tmp_path), 'HTTP 404; ', 'web page')
    assert text.count('http://') == 2

def test_a_part_is_gone_on_with_by_a_new_process(host, tmp_path):
    s = source(host.url('ok'))
    part = download._part(tmp_path, s.url)
    part.write_bytes(BODY[:123_456])
    part.with_name(part.name + '.tag').write_text('"v1"')
    assert fetch([s], tmp_path)[0].read_bytes() == BODY and host.log == [('ok', 123_456)]

def test_without_tag_or_checksum_a_part_is_begun_anew(host, tmp_path):
    s = source(host.url('ok'), None)
    download._part(tmp_path, s.url).write_bytes(b'?'*1000)
    assert fetch([s], tmp_path)[0].read_bytes() == BODY and host.log == [('ok', 0)]

def test_a_part_that_was_whole(host, tmp_path):
    s = source(host.url('ended'))
    download._part(tmp_path, s.url).write_bytes(BODY)
    assert fetch([s], tmp_path)[0].read_bytes() == BODY and host.log == [('ended', 300_000)]

def test_full_disk(host, tmp_path, monkeypatch):
    s = source(host.url('ok'))
    os.symlink('/dev/full', download._part(tmp_path, s.url))
    says(lambda: fetch([s], tmp_path), 'cannot write', 'free some space')
    full = type('Usage', (), dict(free=10))
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda p: full)
    says(lambda: fetch([source(host.url('slow'))], tmp_path), 'needs 0.0 GB', 'free some space')

def test_google_drive_pages_are_turned_into_files(monkeypatch, tmp_path):
    asked = []
    def stream(method, url, **kw):
        asked.append(url)
        raise download.httpx.InvalidURL('stop')
    monkeypatch.setattr(download.httpx, 'stream', stream)
    says(lambda: fetch([source('https://drive.google.com/file/d/1a-B_2')], tmp_path), 'cannot be asked')
    assert asked == ['https://drive.usercontent.google.com/download?id=1a-B_2&export=download&confirm=t']

def test_hub(monkeypatch, tmp_path):
    def hub(repo_id, filename, repo_type, revision, local_dir):
        if revision == 'gone': raise OSError('offline')
        p = Path(local_dir)/filename
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(BODY)
        return str(p)
    monkeypatch.setattr(download, 'hf_hub_download', hub)
    path, record = fetch([source('hf:datasets/a/b/c.zip@gone'), source('hf:datasets/a/b/c.zip@v1')], tmp_path)
    assert path.read_bytes() == BODY and record['checked']
    says(lambda: fetch([source('hf:a/b/c.zip@gone')], tmp_path), 'cannot be had from the hub', 'offline')
    says(lambda: fetch([source('hf:a/b/c.zip@v1', 'md5:' + '0'*32)], tmp_path), 'wrong bytes')

TORCHVISION = [(n, s) for n in data.card_names() for s in load_card(n).sources if s.url.startswith('torchvision:')]

@pytest.mark.parametrize('name,s', TORCHVISION, ids=[n for n, _ in TORCHVISION])
def test_torchvision_is_stopped_at_the_archive_of_the_card(name, s, monkeypatch, tmp_path):
    utils = pytest.importorskip('torchvision.datasets.utils')
    asked, before = [], utils.extract_archive
    def download_url(url, root, filename=None, md5=None, **kw):
        asked.append(md5)
        path = Path(root)/(filename or url.rsplit('/', 1)[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BODY)
    monkeypatch.setattr(utils, 'download_url', download_url)
    path, record = fetch([s.model_copy(update=dict(checksum=SHA, size=len(BODY)))], tmp_path)
    assert path.read_bytes() == BODY and path.name == s.url.rsplit('/', 1)[1]
    assert record['url'] == s.url and record['checked']
    assert asked == [s.checksum and s.checksum[4:]] and utils.extract_archive is before
    says(lambda: fetch([s.model_copy(update=dict(checksum='md5:' + '0'*32, size=None))], tmp_path), 'wrong bytes')
    assert not path.exists()

def test_torchvision_after_a_dead_address(host, monkeypatch, tmp_path):
    utils = pytest.importorskip('torchvision.datasets.utils')
    def offline(*a, **kw): raise OSError('offline')
    monkeypatch.setattr(utils, 'download_url', offline)
    both = [source(host.url('gone')), source('torchvision:DTD/dtd-r1.0.1.tar.gz')]
    says(lambda: fetch(both, tmp_path), 'answered HTTP 404', 'cannot be had from torchvision (OSError: offline)')
    reasons = {'DTD/other.tar.gz': 'offline', 'DTDD/a': 'no attribute', 'StanfordCars/a': 'cannot be downloaded'}
    for url, why in reasons.items(): says(lambda: fetch([source(f'torchvision:{url}')], tmp_path), why)

def test_torchvision_never_unpacks(monkeypatch, tmp_path):
    utils = pytest.importorskip('torchvision.datasets.utils')
    monkeypatch.setattr(utils, 'download_url', lambda *a, **kw: None)
    renamed = source('torchvision:Food101/renamed.tar.gz')
    says(lambda: fetch([renamed], tmp_path), 'cannot be had from torchvision (RuntimeError')

# ---- archives

def tgz(path, *members, mode='w:gz'):
    with tarfile.open(path, mode) as t:
        for name, content, *kind in members:
            i = tarfile.TarInfo(name)
            if kind: i.type, i.linkname = kind[0], content
            else: i.size = len(content)
            t.addfile(i, None if kind else io.BytesIO(content))
    return path

@pytest.mark.parametrize('members,words', [
    ([('../evil', b'x')], 'leads out'),
    ([('/tmp/evil', b'x')], 'leads out'),
    ([('a/../../evil', b'x')], 'leads out'),
    ([('..\\evil', b'x')], 'leads out'),
    ([('l', '/etc', tarfile.SYMTYPE)], 'the link'),
    ([('l', '../x', tarfile.SYMTYPE), ('l/evil', b'x')], 'the link'),
    ([('l', 'a', tarfile.LNKTYPE)], 'the link'),
    ([('d', '', tarfile.CHRTYPE)], 'the device'),
    ([('p', '', tarfile.FIFOTYPE)], 'the device'),
    ([('a', b'1'), ('./a', b'2')], 'twice'),
    ([('a', b'1'), ('a/b', b'2')], 'twice')])
def test_evil_tar_files(tmp_path, members, words):
    tgz(tmp_path/'e.tgz', *members)
    before = sorted(p.name for p in tmp_path.iterdir())
    says(lambda: unpack(tmp_path/'e.tgz', tmp_path/'out'/'deep'), words)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != 'out') == before and not Path('/tmp/evil').exists()

@pytest.mark.parametrize('name,mode,words', [
    ('../evil', 0, 'leads out'), ('/evil', 0, 'leads out'), ('C:/evil', 0, 'leads out'),
    ('l', 0o120777, 'the link'), ('d', 0o020666, 'the device')])
def test_evil_zip_files(tmp_path, name, mode, words):
    with zipfile.ZipFile(tmp_path/'e.zip', 'w') as z:
        i = zipfile.ZipInfo(name)
        i.external_attr = mode << 16
        z.writestr(i, '/etc/passwd')
    says(lambda: unpack(tmp_path/'e.zip', tmp_path/'out'), words)
    assert not list((tmp_path/'out').rglob('*')) if (tmp_path/'out').exists() else True

def test_bombs(tmp_path):
    with zipfile.ZipFile(tmp_path/'b.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for i in range(4): z.writestr(f'{i}', bytes(30 << 20))
    n = (tmp_path/'b.zip').stat().st_size
    says(lambda: unpack(tmp_path/'b.zip', tmp_path/'out', budget=100*n), 'unpacks to far more', 'stopped at')
    assert sum(p.stat().st_size for p in (tmp_path/'out').rglob('*')) < 100*n + (2 << 20)
    tgz(tmp_path/'b.tgz', ('zeros', bytes(30 << 20)))
    says(lambda: unpack(tmp_path/'b.tgz', tmp_path/'out2', budget=1 << 20), 'unpacks to far more')

def test_damaged_archives(tmp_path):
    whole = tgz(tmp_path/'w.tgz', *((f'{i}', os.urandom(5000)) for i in range(9))).read_bytes()
    with zipfile.ZipFile(tmp_path/'w.zip', 'w') as z: z.writestr('a', os.urandom(9000))
    z = (tmp_path/'w.zip').read_bytes()
    cut, patched = (whole[:3000], whole[:-2000]), whole[:9000] + bytes(500) + whole[9500:]
    for k, bad in enumerate((b'', b'no archive', *cut, patched, z[:5000], z[:60] + b'?'*50 + z[110:])):
        (tmp_path/'bad').write_bytes(bad)
        says(lambda: unpack(tmp_path/'bad', tmp_path/f'out{k}'), 'damaged or no archive', 'get it again')

@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
def test_good_archives(tmp_path, mode):
    archive = tgz(tmp_path/'any_name', ('a/1.jpg', b'1'), ('a/\u00e9 \u00fc.jpg', b'2'), mode=mode)
    assert unpack(archive, tmp_path/'out') == 2
    assert (tmp_path/'out'/'a'/'\u00e9 \u00fc.jpg').read_bytes() == b'2'


# ---- a whole dataset of our own, served by the host

CARD = """---
name: toy
title: Toys
licence: CC0-1.0
citation: none
task: [toys]
layout: folder
template: a photo of a <CLASS>.
classes: 3
base: 2
novel: 1
splits: {{train: 6, val: 0, test: 6}}
folders: [toys, toy]
images: img
split_file: split_zhou_Toy.json
split_sha256: {sha}
sources:
{sources}
---
Small things.
"""

@pytest.fixture
def toys(host, tmp_path, monkeypatch):
    "A card for a dataset whose files the host has; `toys.card(...)` writes its sources."
    names = ('ant', 'bee', 'cow')
    def picture(k):
        b = io.BytesIO()
        Image.effect_noise((8, 8), 90).convert('RGB').point(lambda x: (x + k) % 256).save(b, 'PNG')
        return b.getvalue()
    images = {f'{c}/{i}.png': picture(4*k + i) for k, c in enumerate(names) for i in range(4)}
    def entries(*numbers): return [[f'{c}/{i}.png', k, c] for k, c in enumerate(names) for i in numbers]
    split = dict(train=entries(0, 1), val=[], test=entries(2, 3))
    text = json.dumps(split).encode()
    host.split = split
    packed = tgz(tmp_path/'i.tgz', *((f'toys-v1/img/{f}', b) for f, b in images.items()), ('toys-v1/README', b'hello'))
    host.bodies |= {'split': text, 'img.tgz': packed.read_bytes()}
    with zipfile.ZipFile(tmp_path/'w.zip', 'w') as z:
        for f, b in images.items(): z.writestr(f'toy/img/{f}', b)
        z.writestr('toy/split_zhou_Toy.json', text)
        z.writestr('toy/split_fewshot/shot_1.pkl', b'pickle')
    host.bodies['whole.zip'] = (tmp_path/'w.zip').read_bytes()
    (tmp_path/'cards').mkdir()
    monkeypatch.setattr(data, 'cards_dir', lambda: tmp_path/'cards')
    digest = lambda b: 'sha256:' + hashlib.sha256(host.bodies[b]).hexdigest()
    def line(what, url, **more): # of a card
        return json.dumps(dict(what=what, url=url, **more))
    def card(split='ok', images='ok', whole=None):
        lines = [line('split', host.url(split, 'split'), to='split_zhou_Toy.json', checksum=digest('split')),
                 line('images', host.url(images, 'img.tgz'), checksum=digest('img.tgz'))]
        if whole: lines.append(line('whole', host.url(whole, 'whole.zip')))
        lines = [f'  - {l}' for l in lines] # YAML reads JSON
        (tmp_path/'cards'/'toy.md').write_text(CARD.format(sha=digest('split')[7:], sources='\n'.join(lines)))
    host.card, host.root = card, tmp_path/'data'
    monkeypatch.setattr(download.time, 'sleep', lambda s: None)
    return host

def test_get(toys, capsys):
    toys.card(images='breaks')
    report = get('toy', toys.root)
    assert report.ok and report.source == 'published' and not report.classes
    assert report.have == dict(train=6, val=0, test=6)
    assert load_dataset('toy', toys.root).split_source == 'published'
    record = json.loads((toys.root/'toys'/'.ipo_data.json').read_text())
    assert [(r['what'], r['checked']) for r in record] == [('split', True), ('images', True)]
    assert sorted(p.name for p in (toys.root/'.ipo_data').iterdir()) in (['.gitignore'], ['.gitignore', 'toy.lock'])
    n = len(toys.log)
    assert get('toy', toys.root).ok and len(toys.log) == n # nothing is fetched twice
    assert script('get', 'toy', '--data_root', str(toys.root)) == 0 and 'toy passes' in capsys.readouterr().out

def test_get_mends_what_is_missing(toys):
    toys.card()
    get('toy', toys.root)
    (toys.root/'toys'/'img'/'bee'/'2.png').unlink()
    report = check('toy', toys.root)
    assert not report.ok and '1 of the 12 images' in report.problems[0]
    assert report.classes == {'bee': dict(train=(2, 2), val=(0, 0), test=(1, 2))}
    assert get('toy', toys.root).ok

def test_get_clears_what_a_killed_run_left(toys):
    toys.card()
    left = toys.root/'.ipo_data'/'toy-unpacking-x'/'out'
    left.mkdir(parents=True)
    (left/'big').touch()
    other = toys.root/'.ipo_data'/'dtd-unpacking-x'
    other.mkdir()
    assert get('toy', toys.root).ok and not left.parent.exists() and other.exists()

def test_get_keeps_archives_when_asked(toys):
    toys.card()
    get('toy', toys.root, keep=True)
    assert [p.name[5:][-7:] for p in (toys.root/'.ipo_data').glob('kept-*')] == ['img.tgz']

def test_get_takes_the_whole_where_a_piece_is_gone(toys, capsys):
    toys.card(images='gone', whole='ok')
    assert get('toy', toys.root).ok and not list(toys.root.rglob('*.pkl'))
    out = capsys.readouterr().out
    seen = hashlib.sha256(toys.bodies['whole.zip']).hexdigest()
    assert 'answered HTTP 404' in out and 'no checksum' in out and seen in out

def test_get_fails_with_each_reason(toys, capsys):
    toys.card(images='gone', whole='page')
    says(lambda: get('toy', toys.root), 'whole cannot be had', 'web page')
    assert script('get', 'toy', '--data_root', str(toys.root)) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith('ipo_data: images cannot be had') and not any('Traceback' in l for l in err)
    assert err[-1].endswith('data_cards/toy.md says how to get it by hand.')
    assert (toys.root/'toys'/'split_zhou_Toy.json').exists() # what came is kept
    assert not (toys.root/'toys'/'img').exists()

def test_get_leaves_nothing_half_unpacked(toys, tmp_path):
    toys.bodies['img.tgz'] = tgz(tmp_path/'e.tgz', ('toys/img/ant/0.png', b'x'), ('../evil', b'x')).read_bytes()
    toys.card()
    says(lambda: get('toy', toys.root), 'leads out')
    assert not (toys.root/'toys'/'img').exists() and not list(tmp_path.rglob('evil'))

def test_get_does_not_replace_a_split_of_yours(toys):
    toys.card()
    home = toys.root/'toys'
    home.mkdir(parents=True)
    (home/'split_zhou_Toy.json').write_text('{}')
    report = get('toy', toys.root)
    assert not report.ok and (home/'split_zhou_Toy.json').read_text() == '{}'

def test_get_goes_on_after_a_kill(toys, tmp_path):
    toys.bodies['img.tgz'] += bytes(600_000) # padding after the end of the archive
    toys.card(images='slow')
    code = f"""
import sys
from pathlib import Path
from ipo_nb import data
data.cards_dir = lambda: Path({str(tmp_path/'cards')!r})
from ipo_nb.download import main
sys.exit(main('get', ['toy', '--data_root', {str(toys.root)!r}]))"""
    run = lambda: subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p = run()
    part = lambda: next(iter(toys.root.glob('.ipo_data/*-img.tgz.part')), None)
    for _ in range(600):
        if part() and part().stat().st_size > 100_000: break
        threading.Event().wait(.05)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    have = part().stat().st_size
    assert 100_000 < have < len(toys.bodies['img.tgz'])
    p = run()
    p.communicate()
    assert p.returncode == 0 and toys.log[-1] == ('slow', have)

def test_folder_that_may_not_be_written(toys, monkeypatch):
    toys.card()
    def refuse(self, *a, **kw): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(Path, 'mkdir', refuse)
    says(lambda: get('toy', toys.root), 'cannot be written (Permission denied)', 'choose a data_root')

@pytest.mark.parametrize('name,words', [
    ('../../etc', 'no dataset called'), ('mini_objects', 'nothing to get'), ('folder', 'nothing to get'),
    ('imagenett', "did you mean 'imagenet'?")])
def test_names_that_cannot_be_got(tmp_path, name, words):
    says(lambda: get(name, tmp_path), words)
    assert not list(tmp_path.iterdir())

def test_imagenet_is_got_by_hand(tmp_path, monkeypatch):
    def fail(*a): raise IpoError('names cannot be had.')
    monkeypatch.setattr(download, '_get_piece', fail) # its names are in open_clip too
    says(lambda: get('imagenet', tmp_path), 'may not be had by a link', 'data_cards/imagenet.md')


# ---- the doctor

def test_doctor_on_bad_images_and_leaks(toys):
    toys.card()
    get('toy', toys.root)
    img = toys.root/'toys'/'img'
    (img/'ant'/'0.png').write_bytes(b'')
    (img/'bee'/'1.png').write_bytes(b'no image')
    (img/'cow'/'2.png').write_bytes((img/'cow'/'0.png').read_bytes())
    report = check('toy', toys.root)
    assert not report.ok and report.looked == 12 and len(report.problems) == 2
    assert 'ant/0.png is empty' in report.problems[0] and 'bee/1.png is damaged' in report.problems[1]
    assert '1 image of the test list is byte for byte in the training list too' in report.notes[0]
    assert check('toy', toys.root, decode=False).ok

def test_doctor_on_a_subset(toys, capsys):
    toys.card()
    get('toy', toys.root)
    home = toys.root/'toys'
    for p in (home/'img'/'cow').iterdir(): p.unlink()
    assert script('check', 'toy', '--data_root', str(toys.root)) == 1
    out = capsys.readouterr().out
    assert '8 of 12, 4 missing: 4 of 6 train, 0 val, 4 of 6 test' in out
    assert '0/2 train, 0/0 val, 0/2 test' in out and 'does not pass' in out
    def without_cow(entries): return [e for e in entries if e[2] != 'cow']
    sub = {p: without_cow(es) for p, es in toys.split.items()}
    (home/'split_subset_Toy.json').write_text(json.dumps(sub))
    assert script('check', 'toy', '--data_root', str(toys.root)) == 0
    out = capsys.readouterr().out
    assert 'passes as a subset' in out and 'names 8 images, and 8 of them are here' in out
    (home/'img'/'ant'/'0.png').unlink()
    assert not check('toy', toys.root).ok

def changed(path, text=None): # what is done to a file; without a text it only grows by a space
    path.write_text(path.read_text() + ' ' if text is None else text)

@pytest.mark.parametrize('harm,words', [
    (lambda path: path.unlink(), 'there is no split_zhou_Toy.json'),
    (lambda path: changed(path, '{'), 'no JSON'),
    (changed, 'is not the published file')])
def test_doctor_on_split_files(toys, harm, words):
    toys.card()
    get('toy', toys.root)
    harm(toys.root/'toys'/'split_zhou_Toy.json')
    report = check('toy', toys.root)
    assert not report.ok and words in report.problems[0] and 'does not pass' in report_text(report)

def test_doctor_without_data(tmp_path, capsys):
    typo = str(tmp_path/'typo')
    for argv in (['eurosat', '--data_root', str(tmp_path)], ['eurosat', '--data_root', typo], ['../../etc']):
        assert script('check', *argv) == 1
    out = capsys.readouterr()
    assert 'holds no folder eurosat' in out.out and 'does not exist' in out.out
    assert "no dataset called '../../etc'" in out.err

def test_doctor_on_a_folder(tmp_path, capsys):
    for c, n in dict(ant=3, bee=1).items():
        (tmp_path/c).mkdir()
        for i in range(n): Image.new('RGB', (4, 4), (i, 0, 9)).save(tmp_path/c/f'{i}.png')
    assert script('check', 'folder', '--data_root', str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "'bee' (1)" in out and "4 images in 2 class folders, the smallest: 'bee' 1, 'ant' 3." in out
    Image.new('RGB', (4, 4), (7, 0, 9)).save(tmp_path/'bee'/'9.png')
    assert script('check', 'folder', '--data_root', str(tmp_path)) == 0 and 'own split' in capsys.readouterr().out

@real
@pytest.mark.parametrize('name,have,want,classes', [
    ('eurosat', (400, 200, 1200), (13500, 5400, 8100), 10),
    ('caltech101', (200, 100, 200), (4128, 1649, 2465), 100),
    ('dtd', (20, 10, 40), (2820, 1128, 1692), 47)])
def test_doctor_on_real_trees(name, have, want, classes, capsys):
    report = check(name, REAL/'data')
    assert report.ok and report.source == 'subset' and report.looked == sum(have)
    assert report.have == dict(zip(PARTS, have)) and report.want == dict(zip(PARTS, want))
    assert len(report.classes) == classes and 'the published file' in report.split
    n = sum(have)
    assert f'names {n:,} images, and {n:,} of them are here' in report.notes[0]
    def whole(part): return sum(counts[part][1] for counts in report.classes.values())
    assert {p: whole(p) for p in PARTS} == report.want
    some = dict(eurosat=('Pasture Land', (40, 1000), (20, 400), (120, 600)),
                caltech101=('airplane', (2, 400), (1, 160), (2, 240)))
    if name in some:
        c, *counts = some[name]
        assert report.classes[c] == dict(zip(PARTS, counts))
    assert script('check', name, '--data_root', str(REAL/'data'), '--quick', '--json') == 0
    assert json.loads(capsys.readouterr().out)['split_sha'] == load_dataset(name, REAL/'data', verbose=False).split_sha


def test_doctor_on_imagenet(tmp_path, monkeypatch):
    from ipo_nb.data import synsets
    def use(card):
        monkeypatch.setattr(download, 'load_card', lambda n: card)
        monkeypatch.setattr(data, 'load_card', lambda n: card)
    card = load_card('imagenet_a')
    ids = synsets('imagenet_a')
    use(card)
    for w in ids[:-2]:
        d = tmp_path/'imagenet-adversarial'/'imagenet-a'/w
        d.mkdir(parents=True)
        Image.new('RGB', (2, 2)).save(d/'x.jpg')
    report = check('imagenet_a', tmp_path)
    assert not report.ok and report.have == dict(train=0, val=0, test=198)
    assert report.want['test'] == 7500 and report.looked == 198
    assert f'2 of the 200 classes have no folder, for example {ids[-2]}' in report.notes[0]
    assert '198 of 7,500, 7,302 missing' in report_text(report)
    two_each = card.labels.model_copy(update=dict(each={'test': 2}))
    use(card.model_copy(update=dict(splits=dict(train=0, val=0, test=400), labels=two_each)))
    report = check('imagenet_a', tmp_path, decode=False)
    assert len(report.classes) == 198 and report.classes['stingray'] == {'test': (1, 2)}

def test_doctor_on_aircraft(tmp_path, monkeypatch):
    card = load_card('fgvc_aircraft')
    home = tmp_path/'fgvc_aircraft'
    (home/'images').mkdir(parents=True)
    unhashed = card.labels.model_copy(update=dict(sha256={}))
    counts = dict(splits=dict(train=2, val=2, test=2), classes=2, base=1, novel=1)
    card = card.model_copy(update=dict(**counts, labels=unhashed))
    monkeypatch.setattr(download, 'load_card', lambda n: card)
    monkeypatch.setattr(data, 'load_card', lambda n: card)
    assert 'there is no variants.txt' in check('fgvc_aircraft', tmp_path).problems[0]
    (home/'variants.txt').write_text('747\nF/A-18\n')
    for k, p in enumerate(PARTS):
        (home/f'images_variant_{p}.txt').write_text(f'{k}0 747\n{k}1 F/A-18\n')
        for i in (0, 1): Image.new('RGB', (2, 2), (k, i, 0)).save(home/'images'/f'{k}{i}.jpg')
    report = check('fgvc_aircraft', tmp_path)
    assert report.ok and report.source == 'published' and report.split.count('sha256:') == 3
    (home/'images'/'21.jpg').unlink()
    report = check('fgvc_aircraft', tmp_path)
    assert not report.ok and 'for example 21.jpg is missing' in report.problems[0]
    assert report.classes == {'F/A-18': dict(train=(1, 1), val=(1, 1), test=(0, 1))}


# ---- the script

def test_list(capsys):
    assert script('list') == 0
    out = capsys.readouterr().out
    first = {l.split(' ')[0] for l in out.splitlines()}
    assert first >= set(data.card_names()) and '1,331,167' in out
    assert 'yes' in list_text(REAL/'data') if REAL.exists() else True
    assert script('list', '--data_root', '/nowhere') == 1
    assert 'data_root /nowhere does not exist' in capsys.readouterr().err

def test_check_without_a_folder_asks_for_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, 'project_dir', lambda: tmp_path)
    for name in ('eurosat', 'folder'):
        assert script('check', name) == 1 and 'pass data_root' in capsys.readouterr().out
    assert script('check', 'mini_aerial', '--quick') == 0
    (tmp_path/'data').mkdir()
    capsys.readouterr()
    assert script('check', 'eurosat') == 1 and 'data_root data holds no folder eurosat' in capsys.readouterr().out

def test_contents_are_hashed(tmp_path):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(4): Image.new('RGB', (8, 8), (40*i, 90, ord(c))).save(tmp_path/c/f'{i}.png')
    a = check('folder', tmp_path)
    assert a.images_sha in report_text(a)
    Image.new('RGB', (8, 8), (1, 2, 3)).save(tmp_path/'a'/'0.png')
    b = check('folder', tmp_path)
    assert a.split_sha == b.split_sha and a.images_sha != b.images_sha
    (tmp_path/'a'/'0.png').write_bytes(b'no image')
    assert check('folder', tmp_path).images_sha == ''

@pytest.mark.parametrize('argv', [[], ['gett', 'dtd'], ['get'], ['check', 'dtd', '--slow']])
def test_commands_that_are_not_understood(argv, capsys):
    with pytest.raises(SystemExit) as e: script(*argv)
    assert e.value.code == 2 and 'usage: ipo_data' in capsys.readouterr().err

def test_ctrl_c(monkeypatch, capsys):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(download, '_run', stop)
    assert script('list') == 130 and 'goes on from here' in capsys.readouterr().err

def test_the_script_is_installed():
    settings = project_dir()/'settings.ini'
    if not settings.exists(): pytest.skip('not a clone')
    assert 'ipo_data=ipo_nb.commands:ipo_data' in settings.read_text()

def test_the_installed_script_ends_with_a_status_and_a_sentence():
    path = Path(sys.executable).parent/'ipo_data'
    if not path.exists(): pytest.skip('the console scripts are not installed beside this Python')
    def run(*words): return subprocess.run([path, *words], capture_output=True, text=True)
    assert run('check', 'mini_aerial', '--quick').returncode == 0
    wrong = run('check', 'mini_arial', '--data-root', 'data') # both spellings of the option are taken
    assert wrong.returncode == 1 and wrong.stderr.startswith("ipo_data: there is no dataset called 'mini_arial'")
    assert wrong.stderr.count('\n') == 1
    assert run('gett', 'dtd').returncode == 2 and 'usage: ipo_data' in run().stderr
    told = ' '.join(run('get', '--help').stdout.split())
    assert 'seconds without a byte before a host is given up (default: 60)' in told
