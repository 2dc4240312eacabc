"Captioners against class names of real datasets, and the vision captioner against a server on loopback."
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import numpy as np, pytest
from PIL import Image
from ipo_nb.core import IpoError, names_class, sha
from ipo_nb.miniworld import MINI, class_names
from ipo_nb.captioning import VOCABULARY, Description, load_captioner, masked, sentence, vocabulary

class Img:
    def __init__(self, key): self.key, self.name = key, 'Sea or Lake'
    def sha(self): return sha(self.key)
    def open(self): return Image.fromarray(np.full((600, 800, 3), 90, np.uint8))

EUROSAT = ['Annual Crop Land', 'Forest', 'Herbaceous Vegetation Land', 'Highway or Road', 'Industrial Buildings', 'Pasture Land', 'Permanent Crop Land',
           'Residential Buildings', 'River', 'Sea or Lake']
DTD = ('banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked freckled frilly gauzy grid grooved honeycombed '
       'interlaced knitted lacelike lined marbled matted meshed paisley perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained '
       'stratified striped studded swirly veined waffled woven wrinkled zigzagged').split()

@pytest.mark.parametrize('names', [EUROSAT, DTD, *[class_names(m) for m in MINI[:3]]], ids=['eurosat', 'dtd', 'textures', 'objects', 'aerial'])
def test_vocabulary_never_names_a_class(names):
    words = vocabulary(names)
    assert list(words) == list(VOCABULARY)
    for query, phrases in words.values():
        assert len(phrases) >= 8 and not any(names_class(p, n) for p in phrases for n in names)
    assert not any(names_class(sentence({q: ps for q,(_,ps) in words.items()}), n) for n in names)

def test_dtd_loses_near_words():
    left = vocabulary(DTD)['texture'][1]
    for gone in ['small dots', 'interlaced threads', 'thin cracks', 'a mesh of squares', 'veins', 'fine parallel lines']: assert gone not in left

def test_mask_hides_own_and_other_classes():
    d = masked(Img('a'), 'A sea with roads\nand a LAKE', EUROSAT)
    assert d == Description('a', 'A something with something and a something', ('masked',))

@pytest.fixture
def server(monkeypatch, tmp_path):
    "An endpoint that answers from a list of (status, content type, body); what it was sent is kept."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            srv.got.append((dict(self.headers), json.loads(self.rfile.read(int(self.headers['Content-Length'])))))
            status, kind, body = srv.plan.pop(0) if len(srv.plan) > 1 else srv.plan[0]
            self.send_response(status); self.send_header('Content-Type', kind); self.send_header('Retry-After', '0')
            self.end_headers(); self.wfile.write(body.encode())
        def log_message(self, *_): pass
    srv = HTTPServer(('127.0.0.1', 0), Handler); srv.got = []
    srv.spec = f'openai:eye@http://127.0.0.1:{srv.server_port}/v1'
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-very-secret'); monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield srv
    srv.shutdown(); srv.server_close()

def answer(text):
    return 200, 'application/json', json.dumps({'id': 'x', 'object': 'chat.completion', 'created': 0, 'model': 'eye',
        'choices': [{'index': 0, 'finish_reason': 'stop', 'message': {'role': 'assistant', 'content': text}}],
        'usage': {'prompt_tokens': 9, 'completion_tokens': 3, 'total_tokens': 12}})

def test_endpoint(server, tmp_path):
    server.plan = [answer('A lake.'), answer('A blue oval.'), answer('The sea.'), answer('Still the seas.'), (500, 'text/plain', 'x')]
    cap = load_captioner(server.spec, names=EUROSAT, at_once=1)
    got = cap([Img('a'), Img('b')])
    assert [(d.text, d.flags) for d in got] == [('A blue oval.', ('asked again',)), ('Still the something.', ('asked again', 'masked'))]
    assert load_captioner(server.spec, names=EUROSAT)([Img('a'), Img('b')]) == got and len(server.got) == 4 # the second time from the cache
    head, body = server.got[0]
    assert body['temperature'] == 0 and 'Lake' not in json.dumps(body['messages'][0]['content'][0])
    assert body['messages'][0]['content'][1]['image_url']['url'].startswith('data:image/jpeg;base64,')
    kept = json.dumps(cap.describe()) + ''.join(p.read_text() for p in tmp_path.rglob('*') if p.is_file())
    assert 'secret' not in kept and cap.describe()['tokens_in'] == 36

@pytest.mark.parametrize('plan', [(401, 'application/json', '{"error": {"message": "wrong key sk-very-secret"}}'), (404, 'application/json', '{"error": {"message": "no model"}}'),
                                  (200, 'text/html', '<html>proxy</html>'), (200, 'application/json', '{"choices": []}'), (200, 'application/json', '{"choi'), (200, 'application/json', '[]'), answer(None)],
                         ids=['401', '404', 'html', 'no choices', 'cut off', 'list', 'null'])
def test_endpoint_that_fails(server, plan):
    server.plan = [plan]
    with pytest.raises(IpoError) as e: load_captioner(server.spec)([Img('a')])
    assert 'secret' not in str(e.value) and "captioner='clip'" in str(e.value) and '\n' not in str(e.value)

def test_endpoint_without_a_key(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(IpoError, match='did not answer'): load_captioner('openai:eye')([Img('a')])
