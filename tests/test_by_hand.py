"""A person as the optimizer of a whole study: answers through files, cut off, resumed and replayed."""
import threading
from contextlib import contextmanager
import pytest
from ipo_nb import llm, study

short = dict(dataset='mini_aerial', llm='by_hand', captioner='none', steps=2, candidates=2, control=False)
WORDS = 'A clear view of <CLASS>.', 'Land from above: <CLASS>.', 'A <CLASS> seen on a map.', 'Fields, <CLASS>.'

@pytest.fixture(autouse=True)
def quick_looks(monkeypatch, tmp_path):
    "By files and without half a second between two looks; no embedded model."
    def by_files(rest, sampling, folder, **_): return llm.ByHand(folder, wait=.01)
    monkeypatch.setitem(llm.LLMS, 'by_hand', ('by_hand', by_files))
    monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path/'cache'))

@contextmanager
def person(root):
    "Answers each message that appears below a folder, and gives the messages that were answered."
    done, read, words = threading.Event(), [], iter(WORDS)
    def answer(asked):
        message, answered = asked.read_text(), asked.with_name(asked.name.replace('message', 'answer'))
        if answered.exists() or 'prompts wanted' not in message: return
        read.append(message)
        answered.write_text(f'<INS>{next(words)}</INS>\n<INS>{next(words)}</INS>\n')
    def sit():
        while not done.wait(.01):
            for asked in root.rglob('by_hand/*.message.txt'): answer(asked)
    thread = threading.Thread(target=sit, daemon=True)
    thread.start()
    yield read
    done.set()
    thread.join()

def opened(folder): return study.open_study(short | dict(out_dir=str(folder)))

def finished(s):
    s.finish()
    return (s.folder/'result.json').read_bytes()

def test_answers_by_files_cut_off_resumed_and_replayed(tmp_path):
    with person(tmp_path) as read:
        s = opened(tmp_path/'first')
        whole = finished(s)
    assert len(read) == 2 and all('<INS>' in message for message in read)
    assert len(list((s.folder/'by_hand').glob('*.answer.txt'))) == 2
    assert {c['prompt'] for c in s.searched.lines[2]['candidates']} == set(WORDS[2:])
    (s.folder/'result.json').unlink()
    journal = s.folder/'history.jsonl'
    journal.write_bytes(journal.read_bytes()[:-20]) # the last step is lost, its answer is kept
    with person(tmp_path) as read: assert finished(opened(tmp_path/'first')) == whole
    assert read == [] # nobody is asked twice
    for kept in s.folder.glob('by_hand/*'): kept.unlink()
    calls = f"replay:{s.folder/'calls.jsonl'}"
    again = study.open_study(dict(dataset='mini_aerial', llm=calls, out_dir=str(tmp_path/'second')))
    assert finished(again) == whole
    assert '"llm": "by_hand"' in whole.decode() and not (again.folder/'by_hand').exists()
