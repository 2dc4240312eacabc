"""Whole runs over an endpoint: recorded, replayed, paid for, and searched for the key."""
import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from test_study import bin_, complete, nbs, pairs, root
from ipo_nb import core, llm, study
from ipo_nb.core import IpoError

KEY = 'sk-whole-run-0123456789'
recordings = root/'data_cards'/'records'
EVIL = f'<INS>a {KEY} <CLASS>.</INS><INS></pre><script>alert(1)</script> <CLASS> from above.</INS>'

@pytest.fixture
def server(monkeypatch, tmp_path):
    "An endpoint for text and images, whose answers are new each time; it echoes the key and tries to close the HTML."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass

        def do_POST(self):
            ask = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            srv.asked += 1
            time.sleep(srv.pause)
            body = json.dumps(self.answer(ask['messages'][0]['content'])).encode()
            self.send_response(srv.status)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, content):
            if srv.status != 200: return dict(error=dict(message=f'wrong key {KEY}'))
            text = f'<INS>{"very "*srv.asked}fine <CLASS>.</INS>' + EVIL
            if isinstance(content, list): text = f'Number {srv.asked}, a river {KEY}' # about an image
            choice = dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))
            usage = dict(prompt_tokens=1000, completion_tokens=100, total_tokens=1100)
            return dict(id='x', object='chat.completion', created=0, model='m', usage=usage, choices=[choice])

    srv = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    srv.asked, srv.status, srv.pause = 0, 200, 0
    srv.spec = f'openai:m@http://127.0.0.1:{srv.server_port}/v1'
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path/'cache'))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield srv
    srv.shutdown()
    srv.server_close()

def run(server, folder, **kw):
    priced = dict(steps=3, candidates=3, price_in=1., price_out=10.)
    return complete(**dict(llm=server.spec, captioner=server.spec, out_dir=str(folder)) | priced | kw)

def played(s):
    "The stages of a study, and the bytes of its result."
    s.describe()
    s.search()
    s.run_control()
    s.finish()
    return (s.folder/'result.json').read_bytes()

def replay(calls, folder, **kw):
    return study.open_study(dict(dataset='mini_aerial', llm=f'replay:{calls}', out_dir=str(folder)) | kw)

def test_a_recorded_run_replays_to_the_same_bytes_without_a_key(server, tmp_path, monkeypatch):
    s, record = run(server, tmp_path/'first')
    made = (s.folder/'result.json').read_bytes()
    images = len(record.result['few_shot'])
    server.shutdown()
    monkeypatch.delenv('OPENAI_API_KEY')
    monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path/'elsewhere'))
    again = replay(s.folder/'calls.jsonl', tmp_path/'second')
    assert played(again) == made
    assert played(replay(again.folder/'calls.jsonl', tmp_path/'third')) == made # a replay can be replayed
    cost, manifest = record.result['cost'], json.loads((s.folder/'manifest.json').read_text())
    assert cost['optimizer'] == dict(calls=3, tokens_in=3000, tokens_out=300, cost=.006) and manifest['cost'] == cost
    spent = dict(calls=2*images, tokens_in=2000*images, tokens_out=200*images, cost=round(.004*images, 6))
    assert cost['captioner'] == spent | dict(asked_again=images, masked=images) # each said 'river'

ELSE = [(dict(temperature=.3), 'temperature'), (dict(seed=9), 'differs'),
        (dict(candidates=2), 'n \\(2, recorded: 3\\)'), (dict(dataset='mini_objects'), 'recorded on mini_aerial')]

@pytest.mark.parametrize('kw, says', ELSE)
def test_a_replay_of_something_else(tmp_path, kw, says):
    s, _ = complete(out_dir=str(tmp_path/'a'))
    with pytest.raises(IpoError, match=says) as e:
        again = replay(s.folder/'calls.jsonl', tmp_path/'b', **kw)
        again.describe()
        again.search()
    assert '\n' not in str(e.value)

BUDGETS = [(dict(max_calls=2), 2, '2 calls'), (dict(max_tokens=2500), 3, '2500 tokens'),
           (dict(max_cost=.003), 2, '0.003 cost'), (dict(max_seconds=2.5), 3, '2.5 seconds')]

@pytest.mark.parametrize('limit, steps, why', BUDGETS)
def test_budgets_are_exact_to_one_step(server, tmp_path, limit, steps, why):
    server.pause = 1. if 'max_seconds' in limit else 0
    settings = dict(dataset='mini_aerial', llm=server.spec, captioner='none', steps=9, candidates=3, control=False)
    s = study.open_study(settings | dict(price_in=1., price_out=10., out_dir=str(tmp_path)) | limit)
    assert 'planned for the optimizer' in s.intro() and 'currency' in s.intro()
    s.describe()
    s.search()
    assert s.searched.spent.steps == server.asked == steps and why in s.why

MISTAKES = [(dict(price_in=-1), 'price_in'), (dict(price_out=-1), 'price_out'), (dict(max_cost=1), 'price_in'),
            (dict(timeout=0), 'timeout'), (dict(top_p=2), 'top_p'), (dict(reply_tokens=0), 'reply_tokens'),
            (dict(candidates=101), 'candidates'), (dict(llm='openai:m@http://localhost:1'), '/v1'),
            (dict(captioner='openai:m@http://localhost:1'), '/v1'), (dict(llm='opnai:m'), 'openai'),
            (dict(llm='replay:/nowhere'), 'is not there'), (dict(llm='mock'), 'answers'),
            (dict(captioner='hf:a/b', remote_code=True), 'pin the commit')]

@pytest.mark.parametrize('params, says', MISTAKES)
def test_mistakes(tmp_path, params, says):
    with pytest.raises(IpoError, match=says) as e: complete(out_dir=str(tmp_path), **params)
    assert '\n' not in str(e.value)

def test_a_model_that_always_answers_nothing(server, tmp_path, monkeypatch):
    nothing = core.Reply('', 10, 0, 'content_filter', 1)
    monkeypatch.setattr(llm.OpenAIChat, 'say', lambda self, content, **kw: nothing)
    s, record = run(server, tmp_path, captioner='none', steps=50)
    stop = record.result['search']['stop']
    assert s.searched.spent.steps == 10 and 'no progress' in stop and 'content_filter' in stop
    assert record.result['chosen']['prompt'] == core.DEFAULT_PROMPT

def artefacts(folder): return [p for p in folder.rglob('*') if p.is_file()]

def test_the_key_is_in_no_artefact(server, tmp_path):
    "Executed notebook, journal, record, cache, what was printed: of a run that succeeds and of one that is refused."
    params = dict(dataset='mini_aerial', llm=server.spec, captioner=server.spec, steps=2, candidates=3)
    def execute(name):
        given = pairs(params | dict(out_dir=tmp_path/name))
        command = [bin_/'papermill', 'run_dataset.ipynb', tmp_path/f'{name}.ipynb', *given]
        return subprocess.run([*command, '--no-progress-bar', '--log-output'], cwd=nbs, capture_output=True,
                              stdin=subprocess.DEVNULL)

    good = execute('good')
    assert good.returncode == 0, good.stderr[-2000:]
    server.status = 401
    (tmp_path/'cache').rename(tmp_path/'old')
    bad = execute('bad')
    assert bad.returncode != 0 and b'refused the key' in bad.stderr
    kept = artefacts(tmp_path)
    made = {'good.ipynb', 'bad.ipynb', 'history.jsonl', 'calls.jsonl', 'manifest.json', 'result.json', 'report.html'}
    assert made <= {p.name for p in kept}
    assert not [p for p in kept if KEY.encode() in p.read_bytes()]
    assert not [t for t in (good.stdout, good.stderr, bad.stdout, bad.stderr) if KEY.encode() in t]
    assert '<script>alert' not in next(p for p in kept if p.name == 'report.html').read_text()

# --- runs that come with the project: `ipo_run -p dataset NAME -p steps 100 -p out_dir data_cards/records`

NEWER = {'choice', 'control_choice', 'choices'} # what records of 0.1.0 do not say
DRAWN = {'base_ci', 'novel_ci', 'h_ci', 'interval'} # what 0.1.0 drew at random; today it comes from the exact law

def near(a, b):
    "Equal, losses up to what another processor may change in their last digits."
    if isinstance(a, dict):
        same_keys = {*a} - NEWER == {*b} - NEWER and {*a} >= {*b}
        return same_keys and all(near(a[k], b[k]) for k in b if k != 'shown' and k not in DRAWN)
    if isinstance(a, list): return len(a) == len(b) and all(map(near, a, b))
    return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else a == b

def result_of(folder):
    "A result with all settings, also those that are newer than it."
    result = json.loads((folder/'result.json').read_text())
    return result | dict(settings=core.known_settings(result['settings']))

@pytest.mark.parametrize('dataset', ['mini_textures', 'mini_objects', 'mini_aerial'])
def test_a_committed_run_replays(tmp_path, dataset):
    made = {p.parent: json.loads(p.read_text()) for p in recordings.glob(f'{dataset}/*/result.json')}
    def steps(result): return result['settings']['llm'] == 'smollm2' and result['settings']['steps']
    long = [folder for folder, result in made.items() if steps(result) == 100]
    command = f'ipo_run -p dataset {dataset} -p steps 100 -p out_dir data_cards/records'
    if not long: pytest.skip(f'no recording of {dataset} yet: {command}')
    played(replay(long[0]/'calls.jsonl', tmp_path, dataset=dataset))
    again = next(tmp_path.glob('*/*/result.json')).parent
    assert near(*map(result_of, (again, long[0])))
