"What comes from outside: addresses that hold a key, and texts that a terminal obeys."
import json
import subprocess
import sys
import pytest
from ipo_nb import captioning, core, llm, study, sweep
from ipo_nb.core import IpoError

KEY = 'sk-proj-Zx81Qw0pLm7'
FORMS = {'user and password': f'user:{KEY}@host/v1', 'key as user': f'{KEY}@host/v1',
         'escaped': f'user%3A{KEY}@host/v1',
         'api_key': f'host/v1?api_key={KEY}', 'key': f'host/v1?key={KEY}', 'token': f'host/v1?token={KEY}',
         'access_token': f'host/v1?v=1&access_token={KEY}', 'fragment': f'host/v1#{KEY}', 'path': f'host/{KEY}/v1'}
SPECS = {name: f'openai:m@https://{form}' for name, form in FORMS.items()}
SPECS |= {'no scheme': f'openai:m@user:{KEY}@host/v1', 'as the model': f'openai:{KEY}'}

def refused(call): # the sentence
    with pytest.raises(IpoError) as e: call()
    said = str(e.value)
    assert 'OPENAI_API_KEY' in said and KEY not in said and '\n' not in said
    return said

@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_a_key_in_an_address_is_refused_before_anything_is_written(spec, tmp_path):
    folder = tmp_path/'runs'
    for role in ('llm', 'captioner'):
        params = dict(dataset='mini_aerial', out_dir=str(folder)) | {role: spec}
        for begin in (study.find_study, study.open_study, study.run_notebook):
            assert f"parameter '{role}'" in refused(lambda: begin(params))
    refused(lambda: llm.load_llm(spec))
    refused(lambda: captioning.load_captioner(spec))
    file = core.write_text(tmp_path/'s.yaml', json.dumps(dict(name='s', grid=dict(llm=['smollm2', spec]))))
    assert 's.yaml' in refused(lambda: sweep.load_sweep(file, dataset='mini_aerial', out_dir=str(folder)))
    assert not folder.exists()

OF_A_RUN = dict(run=dict(dataset='mini_aerial', settings=dict(captioner=SPECS['api_key'])))
OF_A_CALL = dict(key='k', index=0, role='optimizer', replies=[], request=dict(llm=SPECS['path']))

@pytest.mark.parametrize('line', [OF_A_RUN, OF_A_CALL])
def test_a_key_in_a_recording_is_refused(line, tmp_path):
    file = tmp_path/'calls.jsonl'
    core.append_jsonl(file, line)
    params = dict(dataset='mini_aerial', llm=f'replay:{file}', out_dir=str(tmp_path/'runs'))
    assert str(file) in refused(lambda: study.find_study(params))
    assert not (tmp_path/'runs').exists()

def test_a_key_in_the_clients_own_variable_is_refused(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-other')
    monkeypatch.setenv('OPENAI_BASE_URL', f'https://user:{KEY}@host/v1')
    assert 'OPENAI_BASE_URL' in refused(lambda: llm.load_llm('openai:m'))

def test_nothing_that_a_terminal_obeys_is_printed(capsys):
    class Fake(study.Study):
        def chosen(self, search): return 'a \x1b[2J\u202e<CLASS>\r.'
    Fake(None, None, []).say_stopped(None, 'done\x07')
    study.end('ipo_run', IpoError('the server said \x1b]0;title\x07'))
    out, err = capsys.readouterr()
    assert out == 'stopped: done\\x07; chosen: a \\x1b[2J\\u202e<CLASS>\\r.\n'
    assert err == '\nipo_run: the server said \\x1b]0;title\\x07\n'

def test_ctrl_c_while_a_command_is_loaded_ends_in_one_line():
    command = [sys.executable, '-c', 'from ipo_nb.commands import ipo_run']
    for after in (.3, .6, 1.2):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try: process.wait(after)
            except subprocess.TimeoutExpired: process.send_signal(2)
            said = process.communicate()[1]
        assert (process.returncode, said) in ((130, '\nipo_run: interrupted before it had begun.\n'), (0, ''))
