"Checks of evaluation that are no documentation: agreement with independent computations, odd input."
import numpy as np
import pytest
from ipo_nb.core import DEFAULT_PROMPT, PLACEHOLDER, IpoError, named_classes
from ipo_nb.data import load_dataset, original_labels, shifts
from ipo_nb.evaluation import (
    Half,
    leave_one_out,
    make_evaluation,
    odd_words,
    signatures,
    transfer,
    transfer_means,
    unreadable,
)
from ipo_nb.stats import interval

PRINTED = [ # prompts that the paper prints (tables 3 and 17)
    "TLet's address problem, a photo of a <CLASS>.",
    "Take a well-composed photo of a <CLASS> with optimal lighting, focus, and minimal distractions. Capture the pet's "
    "unique characteristics, including expression and posture, to ensure a clear and distinct image.",
    "Capture a comprehensive range of well-lit, high-resolution images of an <CLASS> from various angles, meticulously "
    "showcasing its specific design features with perfect clarity and precision for unparalleled accuracy in aircraft.",
    "A photo of a <CLASS>, a type of large-scale scene.", "Classify the intricate <CLASS> texture.",
    "Use a higher resolution camera to capture the vehicle photo <CLASS>..",
    "Categorize the <CLASS> shown in the image."]

def test_an_evaluation_at_the_ends():
    ev = make_evaluation('x', '<CLASS>', [0], [1])
    assert (ev.base, ev.novel, ev.h) == (0., 100., 0.)

@pytest.mark.parametrize('mode', ['words', 'phrases', 'auto'])
@pytest.mark.parametrize('prompt', PRINTED)
def test_leave_one_out_keeps_the_placeholder(prompt, mode):
    parts = leave_one_out(prompt, mode)
    assert parts
    for text in [p.prompt for p in parts]:
        assert text.count(PLACEHOLDER) == 1 and '  ' not in text and text.strip() == text
    covered = []
    for p in parts:
        if p.kind in ('word', 'phrase'): covered += range(p.start, p.end)
    assert covered == [i for i, w in enumerate(prompt.split()) if PLACEHOLDER not in w] # each word once
    assert parts[-1].kind in ('before', 'after', 'all')

@pytest.mark.parametrize('prompt', [*PRINTED, DEFAULT_PROMPT, '<CLASS>', '<CLASS>.', 'aerial view: <CLASS>'])
def test_printed_prompts_are_readable(prompt): assert unreadable(prompt) == ''

@pytest.mark.parametrize('prompt', [
    'qzx vfrt wlkj <CLASS>', '<CLASS> <CLASS <CLASS> ... %%% 123 45', 'photo photo photo <CLASS>'])
def test_gibberish_is_not(prompt): assert unreadable(prompt)

@pytest.mark.parametrize('prompt', ['', '   ', '.', '<CLASS>', '...', '日本語 <CLASS>', '\n<CLASS>\t', "''' <CLASS>"])
def test_odd_text_raises_nothing_unexpected(prompt):
    unreadable(prompt), odd_words(prompt), named_classes(prompt, ['', 'a', '日本語'])
    if PLACEHOLDER in prompt: leave_one_out(prompt)
    else:
        with pytest.raises(IpoError): leave_one_out(prompt)

def test_class_names_with_odd_characters():
    names = ['a/b', "bird's nest", 'c<d>', '...', 'AnnualCrop']
    assert named_classes("a bird's nest and <CLASS>", names) == ["bird's nest"]
    assert named_classes('annualcrop <CLASS>', names) == ['AnnualCrop']
    assert named_classes('a class <CLASS>', ['class', 'CLASS']) == [] # too common a word to tell
    assert named_classes('a <CLASS>', ['class']) == []

def test_signatures_without_the_other_methods():
    method = make_evaluation('IPO', 'a <CLASS>', [1], [1]).to_dict()
    result = dict(methods=[method], paired=[], chosen=dict(prompt='a <CLASS>'),
                  data=dict(classes=['x']), search=dict(status={}))
    assert [s['found'] for s in signatures(result)] == [False]*3

# --- elsewhere ---

def test_transfer_scores_a_target_against_its_own_names():
    original = load_dataset('mini_objects').classes
    for name in shifts('mini_objects'):
        assert load_dataset(name).classes == [original[i] for i in original_labels(name)]
    names, seen = [original[i] for i in (0, 3, 5)], []
    def predict(clip, prompts, names, feats):
        seen.append(list(names))
        return np.array([[0, 1, 2, 2]]*len(prompts))
    target = Half(names, np.zeros((4, 2)), np.array([0, 1, 2, 0]))
    row, = transfer(None, {'IPO': 'a <CLASS>'}, [('some', target)], predict=predict)
    assert seen == [names] and (row['accuracy'], row['n'], row['classes'], row['skipped']) == (75., 4, 3, '')
    assert row['interval'] == interval([1, 1, 1, 0])

def test_transfer_keeps_a_row_for_what_it_skips():
    def predict(clip, prompts, names, feats):
        if 'long' in prompts[0]: raise IpoError('too long.')
        return np.zeros((1, len(feats)), int)
    half = Half(['a', 'b'], np.zeros((3, 2)), np.array([0, 0, 1]))
    prompts = {'IPO': 'long <CLASS>', 'default prompt': '<CLASS>'}
    rows = transfer(None, prompts, [('x', half), ('y', 'not here.')], predict=predict)
    said = [(r['dataset'], r['method'], r['skipped']) for r in rows]
    assert said == [('x', 'IPO', 'too long.'), ('x', 'default prompt', ''), ('y', '', 'not here.')]
    assert transfer_means(rows) == {} and transfer_means(rows[1:]) == {'default prompt': 66.6667}
