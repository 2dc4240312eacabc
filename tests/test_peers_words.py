"Words and sentences: other processes, awkward names and answers."
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import pytest
from ipo_nb.core import IpoError
from ipo_nb.data import load_dataset
from ipo_nb.llm import load_llm
from ipo_nb.peers.base import make_task, tiny_clip
from ipo_nb.peers.sentences import Descriptors, Sentences, describe_classes, question
from ipo_nb.peers.words import Ensemble, Template, Waffle, waffle_prompts

NASTY = ['a/b', 'c<d>', 'é "q"', '$x$', "it's", 'x|y', '日本語', '</INS>', 'two\nlines', 'a <CLASS>']

@pytest.fixture(scope='module')
def task():
    t = make_task(load_dataset('mini_textures', verbose=False), tiny_clip(), 1, 1)
    return replace(t, test={h: items[:6] for h, items in t.test.items()})

def test_the_same_waffle_in_another_process():
    code = 'from ipo_nb.peers.words import *\nprint(waffle_prompts(["banded", "polka dotted"], 3, 7))'
    root, env = Path(__file__).parent.parent, os.environ | dict(PYTHONHASHSEED='1')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root, env=env)
    assert done.stdout == f"{waffle_prompts(['banded', 'polka dotted'], 3, 7)}\n"

@pytest.mark.parametrize('cls', [Template, Ensemble, Waffle])
def test_awkward_class_names(task, cls):
    peer, t = cls(), replace(task, base=NASTY[:5], novel=NASTY[5:9])
    peer.fit(t, peer.settings())
    assert all(w.isfinite().all() for w in peer.weights.values()) and peer.weights['base'].shape == (5, 24)

@pytest.mark.parametrize('name', NASTY)
def test_a_class_name_stays_one_line_of_the_question(name):
    q = question(name, 3)
    assert len(q.listing.splitlines()) == 5 and '\n' not in q.message
    assert q.message.count('<INS>') == 1 == q.message.count('</INS>')

ANSWERS = ['', '<INS>', '</INS>'*50, '<INS>'*5000, '<INS><CLASS></INS>'*200, 'I am sorry.',
           '<INS>' + 'x '*50_000 + '<CLASS></INS>', '\x00<INS>a\x00 <CLASS>\u202e</INS>']

@pytest.mark.parametrize('text', ANSWERS)
@pytest.mark.parametrize('cls', [Sentences, Descriptors])
def test_no_answer_breaks_it(task, cls, text):
    peer, llm = cls(), load_llm('mock', answers={'': text})
    t = replace(task, base=task.base[:2], novel=task.novel[:2], llm=llm)
    peer.fit(t, peer.settings())
    assert all(len(found) <= 5 for found in peer.texts().values())
    assert all(w.isfinite().all() for w in peer.weights.values())

def test_goes_on_where_it_was_cut_off(tmp_path, task):
    asked = []
    def answer(message, most):
        asked.append(message)
        if len(asked) > most: raise IpoError('the server is gone.')
        return '<INS>a striped <CLASS>.</INS>'
    def run(most):
        llm = load_llm('mock', answers=lambda m: answer(m, most))
        return describe_classes(llm, task.base[:4], task.clip, folder=tmp_path)
    with pytest.raises(IpoError): run(2)
    found, cost = run(99)
    assert len(asked) == 3 + 2 and cost['calls'] == 4 and set(map(len, found.values())) == {1}

def test_a_settings_typo_names_the_near_one():
    with pytest.raises(IpoError, match="no setting 'pair'; did you mean 'pairs'"): Waffle().settings(pair=3)
