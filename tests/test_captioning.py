"Captioners against class names of real datasets, and the vision captioner against a server on loopback."
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
import numpy as np
import pytest
from PIL import Image
from ipo_nb import captioning
from ipo_nb.captioning import KINDS, VOCABULARY, Description, drawings, load_captioner, masked, sentence, vocabulary
from ipo_nb.core import IpoError, names_class, sha
from ipo_nb.data import FileImage, Item, MiniImage
from ipo_nb.miniworld import MINI, class_names
from ipo_nb.scorer import load_clip

class Img:
    def __init__(self, key): self.key, self.name = key, 'Sea or Lake'
    def sha(self): return sha(self.key)
    def open(self): return Image.fromarray(np.full((600, 800, 3), 90, np.uint8))

EUROSAT = ['Annual Crop Land', 'Forest', 'Herbaceous Vegetation Land', 'Highway or Road', 'Industrial Buildings',
           'Pasture Land', 'Permanent Crop Land', 'Residential Buildings', 'River', 'Sea or Lake']
DTD = """banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous
flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified striped
studded swirly veined waffled woven wrinkled zigzagged""".split()
WORLDS = {m: class_names(m) for m in MINI[:3]}

@pytest.mark.parametrize('names', [EUROSAT, DTD, *WORLDS.values()], ids=['eurosat', 'dtd', *WORLDS])
def test_vocabulary_never_names_a_class(names):
    words = vocabulary(names)
    assert list(words) == list(VOCABULARY)
    for query, phrases in words.values():
        assert len(phrases) >= 8 and not any(names_class(p, n) for p, n in product(phrases, names))
    told = sentence({q: phrases for q, (_, phrases) in words.items()})
    assert not any(names_class(told, n) for n in names)

def test_dtd_loses_near_words():
    left = vocabulary(DTD)['texture'][1]
    near = {'small dots', 'interlaced threads', 'thin cracks', 'a mesh of squares', 'veins', 'fine parallel lines'}
    assert not near & set(left)

def test_mask_hides_own_and_other_classes():
    d = masked(Img('a'), 'A sea with roads\nand a LAKE', EUROSAT)
    assert d == Description('a', 'A something with something and a something', ('masked',))

# --- what is sure, and what is true

@pytest.fixture(scope='module')
def mini(): return load_clip('mini', device='cpu')

def few_of(world): # one image of each class
    return [Item(MiniImage(world, 'train', i), i, name) for i, name in enumerate(class_names(world))]

@pytest.mark.parametrize('spec', ['clip', 'world'])
@pytest.mark.parametrize('world', WORLDS)
def test_sentences_are_whole_and_name_no_class(mini, spec, world):
    few = few_of(world)
    said = load_captioner(spec, mini, WORLDS[world])(few)
    assert said == load_captioner(spec, mini, WORLDS[world])(few)
    for d in said:
        assert d.text.endswith('.') and len(d.text.split()) <= 12 and not d.flags
        assert not any(names_class(d.text, n) for n in WORLDS[world])

def test_a_shifted_world_is_described_as_it_was_shifted():
    few = few_of('mini_objects_sketch') + few_of('mini_objects_dark')
    texts = [d.text for d in load_captioner('world')(few)]
    assert all('white' in t for t in texts[:21]) and all('dim light' in t for t in texts[21:])

def test_the_world_knows_nothing_of_a_photograph():
    with pytest.raises(IpoError, match="a is none: use it with a mini dataset, or captioner='clip'"):
        load_captioner('world')([Img('a')])

def test_an_image_alone_has_no_kind(mini):
    one, = load_captioner('clip', mini)(few_of('mini_aerial')[:1])
    assert not any(one.text.startswith(kind.capitalize()) for kind in KINDS)

def test_photographs_from_space(real, monkeypatch, tmp_path):
    monkeypatch.setattr(captioning, 'drawings', lambda: drawings(20))
    files = [next(f.iterdir()) for f in sorted((real/'data'/'eurosat'/'2750').iterdir())]
    images = [FileImage(str(f), f.name) for f in files]
    said = load_captioner('clip', load_clip(f"local-dir:{real/'clip_small'}", device='cpu'), EUROSAT, tmp_path)(images)
    assert all(d.text.startswith('A satellite image') for d in said) and len({d.text for d in said}) > 3

# --- an endpoint

@pytest.fixture
def server(monkeypatch, tmp_path):
    "An endpoint that answers from a list of (status, content type, body); what it was sent is kept."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            srv.got.append((dict(self.headers), asked))
            status, kind, body = srv.plan.pop(0) if len(srv.plan) > 1 else srv.plan[0]
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.send_header('Retry-After', '0')
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_): pass

    srv = HTTPServer(('127.0.0.1', 0), Handler)
    srv.got, srv.spec = [], f'openai:eye@http://127.0.0.1:{srv.server_port}/v1'
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-very-secret')
    monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield srv
    srv.shutdown()
    srv.server_close()

def answer(text):
    choice = dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))
    usage = dict(prompt_tokens=9, completion_tokens=3, total_tokens=12)
    body = dict(id='x', object='chat.completion', created=0, model='eye', choices=[choice], usage=usage)
    return 200, 'application/json', json.dumps(body)

def test_endpoint(server, tmp_path):
    said = ['A lake.', 'A blue oval.', 'The sea.', 'Still the seas.']
    server.plan = [*map(answer, said), (500, 'text/plain', 'x')]
    cap, images = load_captioner(server.spec, names=EUROSAT, at_once=1), [Img('a'), Img('b')]
    got = cap(images)
    assert got == [Description('a', 'A blue oval.', ('asked again',)),
                   Description('b', 'Still the something.', ('asked again', 'masked'))]
    assert load_captioner(server.spec, names=EUROSAT)(images) == got
    assert len(server.got) == 4 # the second time from the cache
    head, body = server.got[0]
    assert body['temperature'] == 0 and 'Lake' not in json.dumps(body['messages'][0]['content'][0])
    assert body['messages'][0]['content'][1]['image_url']['url'].startswith('data:image/jpeg;base64,')
    kept = json.dumps(cap.describe()) + ''.join(p.read_text() for p in tmp_path.rglob('*') if p.is_file())
    assert 'secret' not in kept and cap.describe()['tokens_in'] == 36

def as_json(body): return 200, 'application/json', body

FAILS = {'401': (401, 'application/json', '{"error": {"message": "wrong key sk-very-secret"}}'),
         '404': (404, 'application/json', '{"error": {"message": "no model"}}'),
         'html': (200, 'text/html', '<html>proxy</html>'), 'no choices': as_json('{"choices": []}'),
         'cut off': as_json('{"choi'), 'list': as_json('[]'), 'null': answer(None)}

@pytest.mark.parametrize('plan', FAILS.values(), ids=FAILS)
def test_endpoint_that_fails(server, plan):
    server.plan = [plan]
    with pytest.raises(IpoError) as e: load_captioner(server.spec)([Img('a')])
    assert 'secret' not in str(e.value) and "captioner='clip'" in str(e.value) and '\n' not in str(e.value)

def test_endpoint_without_a_key(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(IpoError, match='did not answer'): load_captioner('openai:eye')([Img('a')])

# --- models of transformers' own classes, tiny and untrained: what they say is noise, the rest is real

def letters(*specials):
    "A tokenizer of single bytes."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(bytes_)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>', pad_token='<pad>')
    fast.add_special_tokens(dict(additional_special_tokens=list(specials)))
    return fast

MARKS = ['<image>', '<fake_token_around_image>', '<global-img>', '<end_of_utterance>']
TEMPLATE = ("{% for m in messages %}{{ m['role'] | capitalize }}:"
            "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
            "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")

def tiny_idefics(tok):
    "An untrained Idefics3 that says plain letters."
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    image, pad = tok.convert_tokens_to_ids(['<image>', '<pad>'])
    text = dict(model_type='llama', num_key_value_heads=2, vocab_size=len(tok), eos_token_id=tok.eos_token_id,
                pad_token_id=pad, **size)
    config = Idefics3Config(text_config=text, vision_config=dict(image_size=64, patch_size=16, **size),
                            image_token_id=image, scale_factor=2, pad_token_id=pad)
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    odd = lambda i: not tok.decode([i]).isascii() or tok.decode([i]) in tok.all_special_tokens + MARKS
    model.generation_config.suppress_tokens = [i for i in range(len(tok)) if odd(i)]
    return model

@pytest.fixture(scope='module')
def smolvlm(tmp_path_factory):
    "A folder as SmolVLM's: Idefics3 with its processor and chat template."
    from transformers import Idefics3ImageProcessor, Idefics3Processor
    folder, tok, side = tmp_path_factory.mktemp('vlm'), letters(*MARKS), dict(longest_edge=64)
    pixels = Idefics3ImageProcessor(size=side, max_image_size=side, do_image_splitting=False)
    tiny_idefics(tok).save_pretrained(folder)
    Idefics3Processor(pixels, tok, image_seq_len=4, chat_template=TEMPLATE).save_pretrained(folder)
    return folder

def test_hf_on_a_real_vision_model(smolvlm, tmp_path):
    cap, images = load_captioner(f'hf:{smolvlm}', names=EUROSAT, cache=tmp_path), [Img('a'), Img('b')]
    got = cap(images)
    assert all(len(d.text) > 20 and 'Assistant' not in d.text and '<' + 'image>' not in d.text for d in got)
    assert got[0].text == got[1].text # two grey pictures
    assert cap.calls == 2 and cap.tokens_out > 50 and len(list(tmp_path.glob('*.json'))) == 2
    again = load_captioner(f'hf:{smolvlm}', names=EUROSAT, cache=tmp_path)
    assert again(images) == got and again.pipe is None # from the cache, without the model
    word = max(got[0].text.split(), key=len) # a class that the description names: asked again, then masked
    leak = load_captioner(f'hf:{smolvlm}', names=[word], cache=tmp_path)
    d, = leak([Img('a')])
    assert d.flags[0] == 'asked again' and leak.calls == 1 and not names_class(d.text, word)

REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyEyeConfig(PretrainedConfig):
    model_type = 'tiny_eye'

class TinyEye(PreTrainedModel):
    config_class = TinyEyeConfig
    def __init__(self, config):
        super().__init__(config)
        self.see = torch.nn.Linear(3, 1)
        self.post_init()
    def chat(self, image, msgs, context, tokenizer, vision_hidden_states=None, sampling=True, **kw):
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))
        assert torch.is_inference_mode_enabled() and not sampling and context is None and msgs[0]['role'] == 'user'
        n = len(tokenizer(msgs[0]['content'])['input_ids'])
        return f'a field of grey {red} {tuple(self.see.weight.shape)}', context, None
"""

@pytest.fixture
def minicpm(tmp_path):
    "A folder as MiniCPM-V-2.0's: code of its own with a method `chat`, behind AutoModel."
    import torch
    from safetensors.torch import save_file
    folder = tmp_path/'eye'
    folder.mkdir()
    letters().save_pretrained(folder)
    (folder/'modeling_tiny_eye.py').write_text(REMOTE)
    code = dict(AutoConfig='modeling_tiny_eye.TinyEyeConfig', AutoModel='modeling_tiny_eye.TinyEye')
    config = dict(model_type='tiny_eye', architectures=['TinyEye'], dtype='float32', auto_map=code)
    (folder/'config.json').write_text(json.dumps(config))
    weights = {'see.weight': torch.zeros(1, 3), 'see.bias': torch.zeros(1)}
    save_file(weights, folder/'model.safetensors', metadata=dict(format='pt'))
    return folder

def test_hf_with_code_of_its_own(minicpm, tmp_path, monkeypatch):
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path/'modules'))
    describe = lambda spec, **kw: load_captioner(spec, cache=tmp_path, **kw)([Img('b')])
    with pytest.raises(IpoError, match='comes with code of its own'): describe(f'hf:{minicpm}')
    cap = load_captioner(f'hf:{minicpm}', names=EUROSAT, cache=tmp_path, remote_code=True)
    assert cap([Img('a')]) == [Description('a', 'a field of grey 90 (1, 3)')]
    assert cap.tokens_in > 50 and cap.tokens_out > 10
    (minicpm/'modeling_tiny_eye.py').write_text('import a_package_that_is_absent\n' + REMOTE)
    with pytest.raises(IpoError, match='a_package_that_is_absent'): describe(f'hf:{minicpm}', remote_code=True)
    with pytest.raises(IpoError, match='pin the commit'): describe('hf:openbmb/MiniCPM-V-2@main', remote_code=True)
