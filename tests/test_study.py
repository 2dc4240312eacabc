"""Whole runs: the master notebook, kills and resumes, and what a user can get wrong."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
import nbformat
import pytest
from PIL import Image
from ipo_nb import core, study
from ipo_nb.core import IpoError
from ipo_nb.evidence import records, report

root = Path(__file__).resolve().parent.parent
nbs, bin_ = root/'nbs', Path(sys.executable).parent
quick = dict(dataset='mini_aerial', llm='random', steps=3, candidates=3)

def pairs(params):
    "The parameters as texts of a command line."
    out = []
    for name, value in params.items(): out += ['-p', name, str(value)]
    return out

def called(*command, **kw):
    "A command of this environment, as a terminal would start it."
    command = [bin_/command[0], *map(str, command[1:])]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kw)

def papermill(*args, cwd=nbs): return called('papermill', *args, '--no-progress-bar', cwd=cwd)

def complete(**params):
    "All stages in this process."
    s = study.open_study(quick | params)
    s.describe()
    s.search()
    s.run_control()
    return s, s.finish()

# --- the notebook ---

written = ('config.json history.jsonl control.jsonl result.json manifest.json report.html '
           'figures/trajectory.png figures/gallery.pdf tables/methods.md').split()

def test_papermill_from_nbs_and_again_from_the_root(tmp_path):
    done = papermill('run_dataset.ipynb', tmp_path/'out.ipynb', *pairs(quick | dict(out_dir=tmp_path/'runs')))
    assert done.returncode == 0, done.stderr[-2000:]
    folder, = (tmp_path/'runs'/'mini_aerial').iterdir()
    for name in written: assert (folder/name).stat().st_size, name
    before = (folder/'result.json').read_bytes()
    params = pairs(quick | dict(out_dir=tmp_path/'runs'))
    again = papermill('nbs/run_dataset.ipynb', tmp_path/'again.ipynb', *params, cwd=root)
    assert again.returncode == 0, again.stderr[-2000:]
    assert 'finished earlier' in (tmp_path/'again.ipynb').read_text()
    assert (folder/'result.json').read_bytes() == before

def test_without_an_output_the_notebook_goes_to_standard_output(tmp_path):
    complete(out_dir=str(tmp_path))
    done = papermill('run_dataset.ipynb', *pairs(quick | dict(out_dir=tmp_path)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert nbformat.reads(done.stdout, as_version=4).cells

def test_help_explains_every_parameter():
    text = papermill('--help-notebook', 'run_dataset.ipynb').stdout
    for name in core.RunConfig.model_fields: assert f'{name}:' in text, name

def test_the_notebook_has_every_parameter_of_the_configuration():
    cells = nbformat.read(nbs/'run_dataset.ipynb', as_version=4).cells
    cell, = [c for c in cells if 'parameters' in c.metadata.get('tags', [])]
    names = {line.split(':')[0] for line in cell.source.splitlines()}
    assert names == set(core.RunConfig.model_fields)

@pytest.mark.parametrize('params, said', [
    (dict(dataset='mini_texture'), "did you mean 'mini_textures'"),
    (dict(shot=1), "did you mean 'shots'")])
def test_papermill_ends_a_mistake_with_a_sentence(tmp_path, params, said):
    done = papermill('run_dataset.ipynb', tmp_path/'out.ipynb', *pairs(params | dict(out_dir=tmp_path)))
    assert done.returncode != 0 and said in done.stderr
    assert 'IpoError: ' in done.stderr and not list(tmp_path.glob('*/*/result.json'))

def test_ipo_run_shows_progress_and_ends_with_the_places(tmp_path):
    command = ['ipo_run', *pairs(quick | dict(out_dir=tmp_path))]
    first, second = called(*command), called(*command)
    assert first.returncode == second.returncode == 0, first.stderr[-2000:]
    assert 'search:' in first.stderr and 'control:' in first.stderr
    for said in ('H is', 'figures', 'tables', 'result.json'): assert said in first.stdout and said in second.stdout
    assert 'finished earlier' in second.stdout

def test_ipo_run_answers_a_mistake_with_one_sentence(tmp_path):
    done = called('ipo_run', *pairs(dict(dataset='eurosat', data_root=tmp_path/'nowhere')))
    assert done.returncode == 1 and 'Traceback' not in done.stderr + done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith('ipo_run: ') and 'nowhere' in done.stderr

def test_ipo_run_explains_every_parameter():
    text = called('ipo_run', '--help').stdout
    for name in core.RunConfig.model_fields: assert f'--{name}' in text, name
    said = ' '.join(text.split()) # however wide the terminal is
    assert '-p NAME VALUE' in said and "the card's, 20 or 100" in said

def test_a_parameter_is_an_option_too(tmp_path, capsys):
    complete(out_dir=str(tmp_path))
    options = []
    for name, value in (quick | dict(out_dir=tmp_path)).items(): options += [f'--{name}', str(value)]
    assert study.called(study.main, options) == 0
    assert 'finished earlier' in capsys.readouterr().out

# --- the order of the stages ---

stages = dict(describe=study.Study.describe, search=study.Study.search, run_control=study.Study.run_control,
              evaluate=study.Study.evaluate, result=study.Study.result, finish=study.Study.finish)

@pytest.mark.parametrize('first', stages)
def test_each_pair_of_stages_in_any_order_does_what_is_missing(tmp_path, monkeypatch, first):
    "Or says in a sentence why it cannot; the record is that of the usual order."
    monkeypatch.setattr(report, 'write_report', lambda *_: None)
    short = dict(steps=1, candidates=2)
    whole = complete(out_dir=str(tmp_path/'whole'), **short)[0].folder/'result.json'
    for second in stages:
        s = study.find_study(quick | short | dict(out_dir=str(tmp_path/second))) # not even claimed
        stages[first](s)
        if first == 'finish' and second in ('evaluate', 'result'):
            with pytest.raises(IpoError, match='is finished: its record, from finish'): stages[second](s)
        else: stages[second](s)
        s.finish()
        assert (s.folder/'result.json').read_bytes() == whole.read_bytes(), second

def test_a_stage_claims_the_folder(tmp_path):
    s = study.find_study(quick | dict(out_dir=str(tmp_path)))
    s.search()
    with pytest.raises(IpoError, match='another process'): study.open_study(quick | dict(out_dir=str(tmp_path)))
    s.finish()
    assert study.open_study(quick | dict(out_dir=str(tmp_path))).finished

# --- the choice ---

def test_another_rule_goes_through_the_same_search_and_evaluates_the_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'write_report', lambda *_: None)
    (papers, paper), (s, mean) = [complete(out_dir=str(tmp_path), choice=rule) for rule in ('paper', 'average_5')]
    assert papers.folder != s.folder
    assert papers.searched.scored == s.searched.scored and papers.controlled.scored == s.controlled.scored
    assert paper.result['choices'] == mean.result['choices']
    choice, rows = mean.result['choice'], {(r['by'], r['rule']): r for r in mean.result['choices']['rows']}
    assert len(choice['prompts']) == 5 and mean.result['chosen']['prompt'] == choice['prompts'][0]
    assert mean.result['word_importance'][0]['prompt'] == choice['prompts'][0]
    for by, known in (('IPO', choice), ('random control', mean.result['control_choice'])):
        row, = [r for r in mean.result['methods'] if r['name'] == by]
        told = rows[by, 'average_5']
        assert told['prompts'] == known['prompts'] and row['prompt'].startswith('mean of 5 prompts: 0.2 ')
        answers = mean.result['choices']['answers'][told['answers']]
        assert answers == {half: row[half] for half in ('base_correct', 'novel_correct')}

def test_shots_that_the_search_has_not_seen_choose_by_any_rule(tmp_path):
    held = quick | dict(shots=4, holdout=True, control=False, captioner='none', out_dir=str(tmp_path))
    s = study.find_study(held)
    s.search()
    evidence = s.evidence(s.searched)
    assert len(evidence.labels) == len(s.held()) == len(s.few_shot)//2
    scores = s.judge([x.prompt for x in evidence.scored], s.held())
    assert [(x.loss, x.accuracy) for x in evidence.scored] == [(x.loss, x.accuracy) for x in scores]
    assert s.chosen(s.searched).prompts == (s.choose(s.searched).prompt,)
    assert s.choose(s.searched) == min(evidence.scored, key=lambda x: x.key)
    s.lock.release()

def test_fluency_is_measured_where_a_model_has_written(tmp_path, monkeypatch):
    "With the optimizer's own model, into the manifest; the result is without it, and a reader sees both."
    monkeypatch.setattr(report, 'write_report', lambda *_: None)
    s = study.open_study(quick | dict(out_dir=str(tmp_path), steps=1, control=False))
    s.llm.model, s.llm.tok = 'model', 'tok' # stands in for the embedded model
    s.config = s.config.model_copy(update=dict(llm='smollm2'))
    def measure(*own): return lambda prompts: [-9. if own == ('model', 'tok') else 0.]
    monkeypatch.setattr(study.readability, 'load_fluency', measure)
    record = s.finish()
    assert record.manifest['fluency'] == record.result['chosen']['fluency'] == -9.
    written = json.loads((s.folder/'result.json').read_text())
    assert 'fluency' not in written['chosen']
    found = [r['signatures'] for r in (record.result, written)]
    odd, = [(a, b) for a, b in zip(*found) if a != b]
    assert odd[0]['found'] and '-9.00 nats' in odd[0]['sentence'] and not odd[1]['found']

# --- the prompts elsewhere ---

def test_transfer_scores_the_prompts_elsewhere_and_names_what_is_absent(tmp_path):
    s, record = complete(out_dir=str(tmp_path), data_root=str(tmp_path), transfer='mini_textures, eurosat')
    rows = record.result['transfer']
    methods = 'IPO', 'default prompt', 'random control', 'hand-written template'
    assert [(r['dataset'], r['method']) for r in rows] == [*(('mini_textures', m) for m in methods), ('eurosat', '')]
    ipo, default, control, template, absent = rows
    assert ipo['prompt'] == record.result['chosen']['prompt']
    assert 0 < default['accuracy'] < 100 and default['n'] > 100
    assert template['prompt'] == 'a <CLASS> pattern.' and absent['accuracy'] is None
    assert 'eurosat' in absent['skipped'] and str(tmp_path) not in absent['skipped']
    table = report.transfer_table(record)
    assert [r['dataset'] for r in table.rows] == ['mini_textures', 'eurosat', 'mean']
    for f in ('report.html', 'report.md', 'tables/transfer.csv'): assert 'eurosat' in (record.path/f).read_text()

def photographs(folder, classes='abcd'):
    for k, c in enumerate(classes):
        (folder/c).mkdir(parents=True)
        for i in range(6): Image.new('RGB', (32, 32), (40*i, 60*k, 10)).save(folder/c/f'{i}.png')
    return dict(dataset='folder', data_root=str(folder), clip='mini', out_dir=str(folder.parent/'runs'))

def test_an_own_split_is_marked_in_record_tables_and_pages(tmp_path):
    s, record = complete(**photographs(tmp_path/'images'), transfer='folder')
    assert record.result['data']['split_source'] == 'own split'
    assert {r['split'] for r in record.result['transfer']} == {'own split'}
    for name in ('methods', 'scores', 'paired', 'word_importance'):
        rows = (s.folder/'tables'/f'{name}.csv').read_text().splitlines()[1:]
        assert all('own split' in row for row in rows), name
    assert 'folder (own split)' in (s.folder/'tables/transfer.md').read_text().replace('&#95;', '_')
    said = 'own split, not comparable with published figures'
    for f in ('report.html', 'report.md'): assert said in (s.folder/f).read_text()

def test_datasets_beside_a_folder_of_ones_own_are_found(tmp_path):
    params = photographs(tmp_path/'mine')
    params['data_root'] = os.path.relpath(params['data_root'])
    s = study.open_study(quick | params | dict(transfer='eurosat'))
    said = s.target('eurosat')
    assert said.startswith('data_root holds no folder eurosat')
    assert 'data_root data_root' not in said and str(tmp_path) not in said
    assert s.target('folder').split == 'own split'
    for c in ('AnnualCrop', 'Forest', 'River'): (tmp_path/'eurosat'/'2750'/c).mkdir(parents=True)
    said = s.target('eurosat')
    assert said.startswith('there is no split_zhou_EuroSAT.json in data_root') and str(tmp_path) not in said

def test_a_finished_run_says_when_its_images_were_others(tmp_path):
    params = photographs(tmp_path/'images')
    s, record = complete(**params)
    known = record.manifest['data']
    assert len(known['few_shot_images_sha']) == len(known['test_sizes_sha']) == 64
    assert not any('not the files' in n for n in study.open_study(quick | params).notes)
    Image.new('RGB', (32, 32), (1, 2, 3)).save(s.few_shot[0].image.path)
    again = study.open_study(quick | params)
    assert again.finished and 'not the files' in again.intro()
    assert any('the few-shot images here are not the files of this record' in n for n in again.notes)

# --- mistakes, in this process ---

@pytest.mark.parametrize('params, said', [
    (dict(dataset='../../etc'), 'etc'),
    (dict(dataset='eurosat'), 'data_root'),
    (dict(clip='ViT-B-61/openai'), 'ViT-B-16'),
    (dict(clip='local-dir:/nowhere'), 'nowhere'),
    (dict(llm='smolm2'), 'smollm2'),
    (dict(captioner='clap'), 'clip'),
    (dict(choice='medoit'), 'medoid'),
    (dict(shots=0), 'shots'),
    (dict(shots=-1), 'shots'),
    (dict(shots=1000), 'choose another number of shots'),
    (dict(steps='many'), 'steps'),
    (dict(temperature=9), 'temperature'),
    (dict(device='tpu'), 'device'),
    (dict(captioner='file:/nowhere.json'), 'nowhere'),
    (dict(transfer='mini_objets'), 'mini_objects'), (dict(transfer='shifts'), 'no shifted versions')])
def test_one_sentence(tmp_path, params, said):
    with pytest.raises(IpoError, match=said) as e: complete(out_dir=str(tmp_path), **params)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    assert not list(tmp_path.glob('*/*/result.json'))

def test_damaged_images_are_found_before_the_search(tmp_path):
    params = photographs(tmp_path/'images')
    for name in 'ab':
        for i in range(6): (tmp_path/'images'/name/f'{i}.png').write_bytes(b'' if i % 2 else b'no image')
    said = 'image files are empty or no images, for example'
    with pytest.raises(IpoError, match=said): study.open_study(quick | params)
    assert not (tmp_path/'runs').exists()

def test_two_runs_at_once(tmp_path):
    first = study.open_study(quick | dict(out_dir=str(tmp_path)))
    with pytest.raises(IpoError, match='another process'): study.open_study(quick | dict(out_dir=str(tmp_path)))
    first.lock.release()

def test_a_result_of_an_older_version(tmp_path):
    s, _ = complete(out_dir=str(tmp_path))
    path = s.folder/'result.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(format=0)))
    with pytest.raises(IpoError, match='format 0'): study.open_study(quick | dict(out_dir=str(tmp_path)))

def test_a_full_disk_keeps_what_was_done(tmp_path, monkeypatch):
    s = study.open_study(quick | dict(out_dir=str(tmp_path)))
    s.describe()
    fsync, left = os.fsync, [4]
    def full(fd):
        left[0] -= 1
        if left[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')
        return fsync(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(IpoError, match='disk is full'): s.search()
    assert 0 < len(core.read_jsonl(s.folder/'history.jsonl')) < 4 # some steps, not all
    monkeypatch.undo()
    s.lock.release()
    assert complete(out_dir=str(tmp_path))[1].result['search']['steps'] == 3

# --- interruption ---

def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    whole = complete(out_dir=str(tmp_path/'whole'))[0].folder/'result.json'
    s = study.open_study(quick | dict(out_dir=str(tmp_path/'cut')))
    s.search()
    s.lock.release()
    journal = s.folder/'history.jsonl'
    data = journal.read_bytes()
    # inside the last line, inside an earlier one, inside the first, before it
    for cut in (len(data) - 1, len(data)//2, 10, 0):
        journal.write_bytes(data[:cut])
        for f in ('result.json', 'control.jsonl'): (s.folder/f).unlink(missing_ok=True)
        complete(out_dir=str(tmp_path/'cut'))
        assert (s.folder/'result.json').read_bytes() == whole.read_bytes(), cut

script = "import sys; sys.path.insert(0, 'tests'); import test_study as t; t.complete(out_dir=sys.argv[1], steps=12)"

def test_killed_in_mid_search(tmp_path):
    whole, _ = complete(out_dir=str(tmp_path/'whole'), steps=12)
    worker = subprocess.Popen([sys.executable, '-c', script, str(tmp_path/'cut')], cwd=root,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and worker.poll() is None:
        lines = [p.read_bytes().count(b'\n') for p in tmp_path.glob('cut/*/*/history.jsonl')]
        if lines and lines[0] >= 4: worker.send_signal(signal.SIGKILL)
        time.sleep(.005)
    worker.wait()
    again, _ = complete(out_dir=str(tmp_path/'cut'), steps=12)
    assert (again.folder/'result.json').read_bytes() == (whole.folder/'result.json').read_bytes()

# --- real photographs ---

def test_real_photographs(tmp_path, real):
    params = dict(dataset='eurosat', data_root=real/'data', clip=f"local-dir:{real/'clip_small'}", steps=5,
                  llm='random', out_dir=tmp_path/'runs')
    done = papermill('run_dataset.ipynb', tmp_path/'out.ipynb', *pairs(params))
    assert done.returncode == 0, done.stderr[-2000:]
    folder, = (tmp_path/'runs'/'eurosat').iterdir()
    result = records.load_record(folder).result
    assert result['data']['counts'] == dict(train=400, val=200, test=1200, few_shot=5, base_test=600,
                                            novel_test=600)
    assert result['data']['split_source'] == 'subset'
    assert result['methods'][0]['h'] > 40 # five classes a half: chance is 20
