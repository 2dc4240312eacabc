"What the optimizer is told beyond the paper's message: off it changes no byte, on it survives a cut and a replay."
import base64
import io
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
import torch
from PIL import Image
from ipo_nb import llm, optimizer, study, sweep
from ipo_nb.core import DEFAULT_PROMPT, IpoError, MetaPrompt, Reply, Score, Scored, named_classes, read_jsonl, sha
from ipo_nb.evidence.lineage import likeness, lineage, parents
from ipo_nb.evidence.records import made_up_record
from ipo_nb.optimizer import Mistakes, Search, after

WORDS = ['bright', 'magnificent', 'red', 'old', 'astonishingly']
ALL = dict(confusions=True, show_images=2, restarts=1, samples=2)


def toy_llm(meta, n, seed):
    pairs = [(WORDS[(seed+i) % 5], WORDS[(seed//7+i) % 5]) for i in range(n)]
    return [Reply(f'<INS>a {a} {b} <CLASS>.</INS>', 10, 5) for a, b in pairs]


def alike_llm(meta, n, seed): # one family
    return [r.__class__(r.text.replace('>a ', '>a very big and plain thing that is ')) for r in toy_llm(meta, n, seed)]


def toy_score(prompts): return [Score.make(10/len(p), min(99, len(p))) for p in prompts]


def toy(path, steps=6, **kw):
    return Search(toy_llm, toy_score, path, ['river', 'lake'], ['dull green, in even light'],
                  rules=[after('steps', steps)], memory_size=5, **kw)


def timeless(lines): return [{k: v for k, v in line.items() if k != 'seconds'} for line in lines]


# --- off: as before these settings ---

def test_a_search_without_them_is_what_it_was(tmp_path):
    "The hash was taken before there were such settings, of lines without times, the summary and what is shown."
    search = toy(tmp_path/'history.jsonl')
    search.names = ['river']
    why = search.run()
    found = sha(timeless(search.lines), search.summary(why), search.shown())
    assert found == '0a21c04f0581d13dc0f563f8852f97a6a98da8dd8e430b11f4b9587f2b7c952d'


# --- on: a search that is cut off anywhere ends as one that was not ---

def look(prompt): return [[i, i % 2, 1 - i % 2] for i in range(len(prompt) % 7)]


def told(): return Mistakes(look, [f'picture {i}' for i in range(9)], True, 2)


def family(path, steps, **kw):
    search = toy(path, 0, restarts=1, **kw)
    search.llm, search.rules = alike_llm, [after('steps', steps)]
    return search


SETTINGS = dict(mistakes=lambda *a: toy(*a, mistakes=told()), restarts=family, samples=lambda *a: toy(*a, samples=3),
                all=lambda *a: family(*a, mistakes=told(), samples=2))


@pytest.mark.parametrize('name', SETTINGS)
def test_cut_off_after_any_step(name, tmp_path):
    whole = SETTINGS[name](tmp_path/'whole.jsonl', 8)
    whole.run()
    for steps in range(8):
        path = tmp_path/f'{steps}.jsonl'
        SETTINGS[name](path, steps).run()
        with open(path, 'a') as f: f.write('{"step": 4, "repl')
        again = SETTINGS[name](path, 8)
        again.run()
        assert timeless(again.lines) == timeless(whole.lines) and again.summary('') == whole.summary('')
        assert again.shown() == whole.shown() and again.restarted == whole.restarted
    if name in ('restarts', 'all'): assert whole.restarted


def test_the_mistakes_of_a_prompt_are_looked_at_once(tmp_path):
    asked = []
    mistakes = Mistakes(lambda prompt: asked.append(prompt) or look(prompt), range(9), True, 1)
    search = family(tmp_path/'history.jsonl', 8, mistakes=mistakes)
    search.run()
    assert len(asked) == len(set(asked)) == sum('mistakes' in line for line in search.lines) < 9


def test_the_prompt_is_chosen_among_all_families(tmp_path):
    search = family(tmp_path/'history.jsonl', 8)
    search.run()
    assert search.best == optimizer.best_of(search.scored.values()) and len(search.scored) > len(search.memory)
    again = [c for line in search.lines for c in line['candidates'] if c['status'] == 'duplicate']
    assert again # what an old family had is not scored twice


def test_what_is_told_goes_where_there_is_no_room(tmp_path):
    sizes = []
    def narrow(meta, n, seed):
        sizes.append((len(meta.message), len(meta.images)))
        if 'wrong class' in meta.message: raise llm.ContextTooLong('too long.')
        return toy_llm(meta, n, seed)
    search = toy(tmp_path/'history.jsonl', 2, mistakes=told())
    search.llm = narrow
    search.run()
    assert search.level == 2 and sizes[-1][1] == 0
    assert search.summary('')['shortened'] == 'the descriptions were left out, and the mistakes'


# --- samples: P requests of N prompts, at once where the back end can ---

def test_samples_are_asked_at_once(tmp_path):
    together = threading.Barrier(3, timeout=20) # broken where the requests come one after another
    class Both(llm.LLM):
        at_once = 3
        def __call__(self, meta, n, seed):
            together.wait()
            return toy_llm(meta, n, seed)
    search = toy(tmp_path/'history.jsonl', 2, samples=3)
    search.llm = Both()
    search.run()
    assert search.spent.calls == 6 and len(search.lines[1]['replies']) == 15


def test_samples_cost_calls(tmp_path):
    search = toy(tmp_path/'history.jsonl', 9, samples=3)
    search.rules.insert(0, after('calls', 6))
    search.run()
    assert search.spent.steps == 2


@pytest.mark.parametrize('name', ['confusions', 'restarts', 'samples'])
def test_an_ablation_has_equal_calls_and_scored_prompts(name):
    _, runs = sweep.load_sweep(name)
    plans = [optimizer.plan(study.resolve(run)[0]) for run in runs]
    assert len({(p['calls'], p['scored']) for p in plans}) == 1


# --- a whole study with all of it, against a server on this machine ---

def answer_to(ask):
    "Prompts that follow from the request alone; one of them names a class."
    said = json.dumps(ask['messages'], sort_keys=True)
    rng = random.Random(sha(said, ask.get('seed')))
    shade, kind = rng.choice(WORDS), rng.choice(['photo', 'picture', 'view'])
    named = re.search(r'"(\w+)" taken', ask['messages'][0]['content'][0]['text']) if 'taken for' in said else None
    texts = [f'a {shade} {kind} of a <CLASS>.', f'a {kind} of a {shade} <CLASS>.',
             f'a <CLASS> like a {named[1] if named else "thing"}.']
    return ''.join(f'<INS>{t}</INS>' for t in texts)


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass

        def do_POST(self):
            ask = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            srv.asked.append(ask)
            status, body = srv.answer(ask)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def completion(ask):
        choice = dict(index=0, finish_reason='stop', message=dict(role='assistant', content=answer_to(ask)))
        usage = dict(prompt_tokens=11, completion_tokens=7, total_tokens=18)
        return 200, dict(id='x', object='chat.completion', created=0, model='m', choices=[choice], usage=usage)

    srv = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    srv.answer, srv.asked, srv.spec = completion, [], f'openai:m@http://127.0.0.1:{srv.server_port}/v1'
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield srv
    srv.shutdown()
    srv.server_close()


def parts(ask): # text and pictures of a request
    text, *shown = ask['messages'][0]['content']
    urls = [p['image_url']['url'] for p in shown]
    assert text['type'] == 'text' and all(p['type'] == 'image_url' for p in shown)
    assert all(u.startswith('data:image/jpeg;base64,') for u in urls)
    return text['text'], [Image.open(io.BytesIO(base64.b64decode(u.partition(',')[2]))) for u in urls]


def the_study(spec, out, **kw):
    settings = dict(dataset='mini_textures', captioner='none', steps=5, shots=2, candidates=3, control=False)
    return study.open_study(settings | dict(llm=spec, out_dir=str(out)) | kw)


def result(done): return (done.folder/'result.json').read_bytes()


def test_a_study_with_all_of_it(server, tmp_path):
    done = the_study(server.spec, tmp_path/'a', **ALL)
    done.finish()
    base, novel = done.halves
    assert len(server.asked) == 10 == done.searched.spent.calls
    for ask in server.asked:
        text, pictures = parts(ask)
        assert 0 < len(pictures) <= 2 and all(p.format == 'JPEG' and max(p.size) <= 384 for p in pictures)
        assert named_classes(text, base) and not named_classes(text, novel)
        assert 'that names a class is thrown away' in text and 'come' in text
    counts = done.searched.summary('')['status']
    assert counts['names a class'] and not [p for p in done.searched.scored if named_classes(p, base)]

    whole, journal = result(done), done.folder/'history.jsonl' # cut off in the last step
    (done.folder/'result.json').unlink()
    journal.write_bytes(journal.read_bytes()[:-20])
    asked = len(server.asked)
    again = the_study(server.spec, tmp_path/'a', **ALL)
    again.finish()
    assert result(again) == whole and len(server.asked) == asked # answers are kept

    replayed = the_study(f"replay:{done.folder/'calls.jsonl'}", tmp_path/'b')
    replayed.finish()
    assert result(replayed) == whole and replayed.config.show_images == 2

    record = study.records.load_record(done.folder)
    assert len(lineage(record)) == len(done.searched.scored)
    requests = [line['request'] for line in read_jsonl(done.folder/'calls.jsonl') if 'key' in line]
    assert all(len(r['images']) == 64 for r in requests)


def test_without_pictures_the_content_is_plain_text(server, tmp_path):
    the_study(server.spec, tmp_path, steps=1, restarts=2).finish()
    assert [type(ask['messages'][0]['content']) for ask in server.asked] == [str]


def test_a_server_whose_model_is_blind_says_so_in_one_sentence(server, tmp_path):
    server.answer = lambda ask: (400, dict(error=dict(message='This model does not support image input')))
    with pytest.raises(IpoError, match='does not support image input'): the_study(
        server.spec, tmp_path, steps=1, show_images=1).finish()


@pytest.mark.parametrize('settings, sentence', [
    (dict(show_images=2), "llm 'random' cannot see: use openai:MODEL or hf:MODEL with a vision model"),
    (dict(confusions=True), "llm 'random' does not read it: use openai:MODEL")])
def test_who_cannot_be_told_is_refused_before_anything(settings, sentence, tmp_path):
    with pytest.raises(IpoError, match=sentence): the_study('random', tmp_path, **settings)
    assert not list(tmp_path.rglob('*.jsonl'))


def test_the_control_asks_as_often(tmp_path):
    done = the_study('random', tmp_path, samples=2, control=True, steps=3)
    done.run_control()
    assert done.controlled.spent.scored == done.searched.spent.scored > 1 + 3*3
    assert done.controlled.spent.steps == done.searched.spent.steps


# --- a vision model on this machine ---

class Wide:
    def sha(self): return sha('wide')
    def open(self): return Image.new('RGB', (800, 200), 'green')


def tiny_llava():
    "A vision model of random weights, and its processor."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    vocab = {w: i for i, w in enumerate(['<unk>', '<pad>', '<eos>', '<image>', 'what', 'is', 'shown', 'a', 'river'])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token='<unk>', pad_token='<pad>', eos_token='<eos>',
                                  additional_special_tokens=['<image>'])
    template = ("{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image> {% else %}"
                "{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}")
    square = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    processor = LlavaProcessor(square, tok, patch_size=16, vision_feature_select_strategy='default',
                               num_additional_image_tokens=1, chat_template=template, image_token='<image>')
    layers = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    sees = CLIPVisionConfig(**layers, image_size=32, patch_size=16, projection_dim=16)
    speaks = LlamaConfig(**layers, vocab_size=len(vocab), pad_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=sees, text_config=speaks, image_token_index=3))
    return model.eval(), processor


def test_a_local_vision_model_is_shown_the_pictures():
    model, processor = tiny_llava()
    chat = llm.LocalVision('tiny', llm.Sampling(max_tokens=6), model=model, tok=processor)
    meta, shown = MetaPrompt('what is shown', ''), MetaPrompt('what is shown', '', images=(Wide(), Wide()))
    state = torch.get_rng_state()
    (blind,), (seeing,) = chat(meta, 1, 3), chat(shown, 1, 3)
    assert seeing.tokens_in == blind.tokens_in + 2*4 and 0 < seeing.tokens_out <= 6 # four patches a picture
    assert chat(shown, 1, 3) == [seeing] and torch.equal(state, torch.get_rng_state())
    read = chat._read(shown)
    assert read['pixel_values'].shape == (2, 3, 32, 32)
    assert chat.sees and llm.Recorded(chat, None).sees


# --- parents ---

def test_parents_of_the_control_are_the_true_ones():
    "Children of one edit each: the parent that is named is the true one, or as near."
    rng, pool = random.Random(1), sorted(set(llm.CONTROL_WORDS))
    shown = [Scored(r.text[5:-6], 1., 50. + i, i) for i, r in enumerate(
        llm.RandomControl()(MetaPrompt('', '', (Scored(DEFAULT_PROMPT, 1., 50.),)), 19, 1))]
    named = 0
    for _ in range(300):
        true = rng.choice(shown)
        words = true.prompt[:-1].split()
        child = ' '.join(llm.edit(words, words, pool, rng)) + '.'
        found = parents(child, shown)
        named += bool(found) and likeness(child, found[0].prompt) >= likeness(child, true.prompt)
    assert named == 299 # one has three words, of which two changed places


def test_lineage_sees_the_memory_that_the_search_showed(tmp_path):
    search = family(tmp_path/'history.jsonl', 8)
    search.run()
    known = made_up_record(tmp_path/'run')
    known.result['settings'].update(memory=5, restarts=1)
    known.history[:] = search.lines
    births = lineage(known)
    assert [b.child.prompt for b in births] == list(search.scored) and search.restarted
    for start in search.restarted: # whoever is born in the step after it has the default prompt for a parent, or none
        after_it = [b for b in births if b.child.step == start + 1]
        assert {p.prompt for b in after_it for p in b.parents} <= {DEFAULT_PROMPT}
