"CONTRIBUTING's guide `Add a compared method`, followed: toy peers that run, are kept, and stand in the table."
import sys
from dataclasses import replace
from types import ModuleType
import pytest
import torch
import torch.nn.functional as F
from ipo_nb.data import load_dataset
from ipo_nb.evidence.records import load_records
from ipo_nb.paper.methods import peer_table
from ipo_nb.peers.base import TRAINING, Learner, Peer, cost, make_task, tiny_clip
from ipo_nb.peers.registry import PEERS, PeerEntry, parse_peers, run_peer
from ipo_nb.peers.words import WordsPeer
from ipo_nb.scorer import text_features

class Shift(Learner):
    "One learned vector for all classes, added to the text features of the template."
    name, title, source = 'shift', 'Shift', 'made up for the guide'
    defaults = TRAINING | dict(epochs=3, augment=False)

    def build(self, task, settings):
        width = task.feats('few_shot').shape[1]
        return torch.nn.ParameterDict(dict(shift=torch.zeros(width)))

    def text(self, task, names):
        first = text_features(task.clip, [task.template], names)[0].to(task.clip.device)
        return F.normalize(first + self.learned['shift'], dim=-1)

    def loss(self, task, batch, settings):
        text = self.text(task, task.base)
        return F.cross_entropy(task.clip.logit_scale * batch.feats @ text.T, batch.labels)

class Shout(WordsPeer):
    "A prompt in capitals: a peer of words only writes them."
    name, title, source = 'shout', 'Shout', 'made up for the guide'
    defaults = dict(marks=1) # exclamation marks

    def write(self, task, settings): return ['A PHOTO OF A <CLASS>' + '!'*settings['marks']]

class Blind(Peer):
    "The protocol and nothing else: every image is of the first class."
    name, title, source, kind = 'blind', 'Blind', 'made up for the guide', 'words'

    def fit(self, task, settings):
        self.used, self.note = settings, 'It looks at no image.'
        return cost()
    def logits(self, task, which):
        return F.one_hot(torch.zeros(len(task.items(which)), dtype=torch.long), len(task.names(which))).float()

TOYS = [Shift, Shout, Blind]
each = pytest.mark.parametrize('toy', TOYS, ids=lambda t: t.name)

@pytest.fixture(autouse=True)
def registered(monkeypatch, tmp_path):
    "What a notebook and its line in `PEERS` do."
    monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path/'cache'))
    module = ModuleType('ipo_nb.peers.toys')
    for toy in TOYS:
        setattr(module, toy.__name__, toy)
        monkeypatch.setitem(PEERS, toy.name, PeerEntry('toys', toy.name, {}, ''))
    variant = PeerEntry('toys', 'shout', dict(marks=3), 'Shout, 3 marks') # a variant is a line
    monkeypatch.setitem(PEERS, 'shout3', variant)
    monkeypatch.setitem(sys.modules, 'ipo_nb.peers.toys', module)

@pytest.fixture
def task():
    t = make_task(load_dataset('mini_textures', verbose=False), tiny_clip(), 1, 1)
    return replace(t, test={half: items[:24] for half, items in t.test.items()})

@each
def test_runs_and_stands_in_the_table(toy, task, tmp_path):
    assert parse_peers(toy.name, task) == [toy.name]
    record = run_peer(toy.name, task, tmp_path, 'mini_textures')
    assert (record['title'], record['kind'], record['source']) == (toy.title, toy.kind, toy.source)
    assert record['note'] == ('It looks at no image.' if toy is Blind else '')
    assert [record['data']['counts'][f'{half}_test'] for half in ('base', 'novel')] == [24, 24]
    assert toy.title in str(peer_table(load_records(tmp_path)).rows)

@each
def test_a_second_run_reads_the_record(toy, task, tmp_path, monkeypatch):
    first = run_peer(toy.name, task, tmp_path, 'mini_textures')
    monkeypatch.setattr(toy, 'fit', lambda *args: pytest.fail('learned again'))
    assert run_peer(toy.name, task, tmp_path, 'mini_textures') == first

def test_what_was_learned_is_kept_before_it_is_judged(task, tmp_path, monkeypatch):
    def cut(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Shift, 'logits', cut)
        with pytest.raises(KeyboardInterrupt): run_peer('shift', task, tmp_path, 'mini_textures')
    monkeypatch.setattr(Shift, 'fit', lambda *args: pytest.fail('learned again'))
    record = run_peer('shift', task, tmp_path, 'mini_textures')
    assert record['cost'] == cost(parameters=24, images=3*12)

def test_a_variant_and_a_setting(task, tmp_path):
    assert run_peer('shout3', task, tmp_path, 'mini_textures')['texts'] == ['A PHOTO OF A <CLASS>!!!']
    assert run_peer('shout', task, tmp_path, 'mini_textures', marks=2)['texts'] == ['A PHOTO OF A <CLASS>!!']

def test_the_protocol_says_what_is_its_own():
    for method in (Peer().fit, Peer().logits, Peer().load):
        with pytest.raises(NotImplementedError): method(*[None]*(method.__code__.co_argcount - 1))
    assert (Peer().state(), Peer().texts(), Peer().explain(None)) == ({}, [], {})
    assert (Peer.note, Peer.needs, Peer.uses) == ('', (), ())
