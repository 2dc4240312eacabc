"A record's name lasts, and so does its address when its sweep is packed: each committed record is found and read."
import random
import zipfile
from functools import cache
from pathlib import Path
import pytest
from ipo_nb import core
from ipo_nb.core import (
    BASE,
    ELSEWHERE,
    IpoError,
    RunConfig,
    cards_dir,
    fields_for,
    known_settings,
    make_config,
    old_run_name,
    older_defaults,
    run_folder,
    run_id,
    run_name,
    setting,
    sha,
    write_json,
)
from ipo_nb.data import Settings
from ipo_nb.evidence.records import (
    Record,
    load_record,
    load_records,
    made_up_run,
    pack_sweep,
    read_records,
    records_in,
    unpack,
)

FIRST_FIELDS = """transfer patience max_calls max_tokens max_seconds max_cost price_in price_out remote_code control
every_prompt feedback extremes max_words step_images holdout dataset split clip shots seed steps candidates memory llm
captioner temperature top_p reply_tokens precision""".split() # those of the day on which format 2 began


class Newer(RunConfig):
    "The configuration of a later version."
    mirrored: bool = setting(False, 'method', 'also show each image mirrored')


class Slower(RunConfig):
    "A later version with another default."
    steps: int = setting(200, 'search', 'steps of the search')


@cache
def committed():
    "Every committed record, read from its folder or its packed sweep."
    return [load_record(path) for path in records_in(cards_dir()/'records', deep=True)]


@cache
def searches():
    "Each committed search: its path, result and configuration."
    return [(r.path, r.result, r.config) for r in committed() if isinstance(r, Record)]


def data_sha(result): return sha(result['data']['split_sha'], result['data']['few_shot_sha'])


def names(): return [run_name(result['settings'], data_sha(result)) for _, result, _ in searches()]


def as_made(config): return older_defaults(config) | config # a stored configuration, with what it is silent about


def ids(model): return [run_id(model(**as_made(config)), data_sha(result)) for _, result, config in searches()]


def test_base_has_just_the_fields_that_define_a_result():
    assert tuple(BASE) == fields_for('result')
    assert not BASE.keys() & ELSEWHERE and BASE.keys() | ELSEWHERE == RunConfig.model_fields.keys()


def test_entries_of_the_base_never_change():
    first = {k: v for k, v in BASE.items() if k in FIRST_FIELDS}
    assert sha(first) == '4a19e2da338f3d1ca052596638258eea072a9168cc13bbf07d515eff8a4631d4'


def test_committed_searches_keep_their_names():
    assert len(searches()) == 176
    assert sha(sorted(names())) == 'dee27d5808e65427e7c72ce7d56bded5256dce78cb0d2e452947d33c8c2b9f38'
    assert names() == ids(RunConfig) # the settings of a result name it as its configuration does


def test_committed_searches_lie_under_their_names():
    for folder, result, config in searches():
        assert folder.name == run_name(result['settings'], data_sha(result)), folder


def test_names_of_format_1_follow_from_result_and_configuration_alike():
    for folder, result, config in searches():
        assert old_run_name(result['settings'], data_sha(result)) == old_run_name(config, data_sha(result)), folder


def test_a_new_field_with_a_default_renames_no_record(monkeypatch):
    before = names()
    monkeypatch.setitem(core.BASE, 'mirrored', False)
    assert names() == before
    assert ids(Newer) == before


def test_a_new_field_that_is_missing_in_the_base_is_not_overlooked():
    with pytest.raises(IpoError, match="the setting 'mirrored', which this version of ipo_nb does not know"):
        run_id(Newer(dataset='dtd'), 'x')


def test_another_default_renames_no_record_and_names_new_runs_apart():
    assert ids(Slower) == names()
    assert run_id(Slower(dataset='dtd'), 'x') == run_id(RunConfig(dataset='dtd', steps=200), 'x')
    assert run_id(Slower(dataset='dtd'), 'x') != run_id(RunConfig(dataset='dtd'), 'x')


CHANGES = dict(
    transfer='shifts', patience=3, max_calls=3, max_tokens=3, max_seconds=3., max_cost=3., price_in=3., price_out=3.,
    remote_code=True, control=False, every_prompt=True, feedback='none', extremes=True, max_words=3, step_images=3,
    described=3, holdout=True, choice='medoid', dataset='eurosat', split='own', draw='hash', test_images=3, clip='mini',
    shots=3, seed=3, steps=3, candidates=3, memory=3, llm='random', captioner='none', captioner_version=2,
    temperature=.5, top_p=.5, reply_tokens=3, precision='fp32', confusions=True, show_images=3, restarts=3, samples=3)


def test_every_value_that_defines_a_result_changes_the_name():
    assert CHANGES.keys() == BASE.keys()
    changed = [run_id(make_config(**dict(dataset='dtd') | {k: v}), 'x') for k, v in CHANGES.items()]
    assert len({run_id(make_config(dataset='dtd'), 'x'), *changed}) == len(CHANGES) + 1


def test_what_defines_no_result_changes_no_name():
    changes = dict(data_root='a', few_shot_index='a', out_dir='a', device='cpu', timeout=3., peers='all')
    assert changes.keys() == ELSEWHERE
    assert run_id(make_config(dataset='dtd', **changes), 'x') == run_id(make_config(dataset='dtd'), 'x')


def test_an_older_record_is_read_with_the_base_where_it_is_silent():
    old = dict(dataset='dtd', memory=3, timeout=5.)
    assert known_settings(old) == BASE | dict(dataset='dtd', memory=3)
    assert run_name(old, 'x') == run_id(make_config(**as_made(old)), 'x')
    assert run_name(old, 'x') != run_id(make_config(dataset='dtd', memory=3), 'x') # which draws as CoOp does


def test_a_record_that_names_no_draw_had_that_of_0_1_0():
    assert older_defaults(dict(dataset='dtd')) == dict(draw='hash')
    assert older_defaults(make_config(dataset='dtd').model_dump()) == {}
    for _, result, config in searches():
        assert known_settings(result['settings'])['draw'] == as_made(config)['draw']


def test_a_setting_of_a_newer_version_is_refused_with_the_mend():
    with pytest.raises(IpoError, match="has the setting 'mirrored'.*read it with the version that its manifest.json"):
        known_settings(dict(dataset='dtd', mirrored=True))


def test_every_committed_search_is_found_where_it_lies():
    for folder, result, config in searches():
        out_dir = str(folder.parent.parent).removesuffix('.zip')
        assert str(run_folder(RunConfig(**as_made(config) | dict(out_dir=out_dir)), data_sha(result))) == str(folder)


def test_the_records_of_the_repository_are_few_and_small():
    files = [f for f in (cards_dir()/'records').rglob('*') if f.is_file()]
    assert len(files) <= 300
    assert sum(f.stat().st_size for f in files) <= 20e6
    assert len(committed()) == 524 and len(searches()) == 176


def test_committed_zips_are_whole_and_without_dates():
    for file in (cards_dir()/'records').glob('*.zip'):
        with zipfile.ZipFile(file) as z:
            assert z.testzip() is None
            assert {i.date_time for i in z.infolist()} == {(1980, 1, 1, 0, 0, 0)}
            assert z.namelist() == sorted(z.namelist())
            assert {Path(name).suffix for name in z.namelist()} <= {'.json', '.jsonl'}


def sweep_of(tmp_path, seeds=(1, 2)):
    for seed in seeds: made_up_run(tmp_path/'sweep'/'made_up'/f'{seed:012}', seed=seed)
    return tmp_path/'sweep'


def test_equal_records_are_packed_to_equal_bytes(tmp_path):
    files = [pack_sweep(sweep_of(tmp_path/name)) for name in 'ab']
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [p.name for p in (tmp_path/'a').iterdir()] == ['sweep.zip']


def test_what_is_unfinished_or_no_record_stays_beside_the_zip(tmp_path):
    home = sweep_of(tmp_path)
    (home/'made_up'/f'{2:012}'/'result.json').unlink()
    write_json(home/'tables'/'peers.json', {})
    pack_sweep(home)
    assert sorted(p.name for p in home.iterdir()) == ['made_up', 'tables']
    shelf = read_records(home)
    assert [r.path.name for r in shelf.runs] == [f'{1:012}']
    assert shelf.notes == [f'made_up/{2:012} is unfinished and left out: the same command goes on with it.']


def test_a_damaged_record_is_not_packed_and_nothing_is_lost(tmp_path):
    home = sweep_of(tmp_path)
    (home/'made_up'/f'{2:012}'/'result.json').write_text('{')
    with pytest.raises(IpoError, match='is not JSON any more'): pack_sweep(home)
    assert not home.with_suffix('.zip').exists() and (home/'made_up'/f'{1:012}'/'history.jsonl').exists()


def test_a_run_of_a_packed_sweep_is_found_by_its_configuration(tmp_path):
    config = make_config(dataset='dtd', out_dir=str(tmp_path/'sweep'), steps=7)
    for name in (old_run_name(config.model_dump(exclude={'out_dir'}), 'x'), run_id(config, 'x')): # old first
        folder = tmp_path/'sweep'/'dtd'/name
        made_up_run(folder)
        write_json(folder/'config.json', config.model_dump(exclude={'out_dir'}))
        pack_sweep(tmp_path/'sweep')
        assert str(run_folder(config, 'x')) == str(tmp_path/'sweep.zip'/'dtd'/name) + '/'
        assert run_folder(config, 'y') == tmp_path/'sweep'/'dtd'/run_id(config, 'y')
    assert unpack(run_folder(config, 'x')) == folder == run_folder(config, 'x')


def test_a_damaged_zip_is_refused_in_one_sentence(tmp_path):
    home = sweep_of(tmp_path, seeds=[1])
    file = pack_sweep(home)
    whole, draw = file.read_bytes(), random.Random(0)
    for _ in range(200):
        at = draw.randrange(len(whole))
        file.write_bytes(draw.choice([whole[:at], whole[:at] + b'?'*40 + whole[at + 40:]]))
        try: shelf = read_records(home)
        except IpoError as e:
            assert 'restore it' in str(e) and '\n' not in str(e)
            continue
        assert not shelf.runs or len(shelf.runs[0].history) == 5 # what is read is whole
    file.write_bytes(whole[:1000])
    with pytest.raises(IpoError, match=r'sweep.zip is damaged: restore it'): load_records(home)
    with pytest.raises(IpoError, match=r'sweep.zip is damaged: restore it'):
        run_folder(make_config(dataset='dtd', out_dir=str(home)), 'x')


def test_a_packed_run_counts_as_finished():
    from ipo_nb import sweep
    _, params = sweep.load_sweep('transfer')
    runs = sweep.look_all(params)
    assert [r.state for r in runs] == ['finished']*3
    assert not Path(runs[0].config.out_dir).exists() # nothing was unpacked
    assert sweep.paces([runs[0].config.out_dir])['smollm2']


def old_folder(config, data):
    "A folder as format 1 made it."
    stored = config.model_dump(exclude={'out_dir'})
    folder = Path(config.out_dir)/config.dataset/old_run_name(stored, data)
    write_json(folder/'config.json', stored)
    return folder


def test_a_run_of_format_1_is_found_under_its_old_name(tmp_path, monkeypatch):
    config = make_config(dataset='dtd', out_dir=str(tmp_path), steps=7)
    old = old_folder(config, 'x')
    assert run_folder(config, 'x') == old != run_folder(config, 'y')
    assert run_folder(config.model_copy(update=dict(steps=8)), 'x').name != old.name
    monkeypatch.setitem(core.BASE, 'mirrored', False) # and by a later version
    newer = Newer(**config.model_dump())
    assert run_folder(newer, 'x') == old
    assert run_folder(newer.model_copy(update=dict(mirrored=True)), 'x') != old
    new = tmp_path/'dtd'/run_id(config, 'x')
    new.mkdir()
    assert run_folder(config, 'x') == new # today's name goes first


@pytest.mark.parametrize('text', ['', '[]', '{"steps": 7', '{"mirrored": true}', '{}', 'null'])
def test_a_damaged_neighbour_hinders_no_run(tmp_path, text):
    config = make_config(dataset='dtd', out_dir=str(tmp_path))
    beside = tmp_path/'dtd'/'0123456789ab'
    beside.mkdir(parents=True)
    (beside/'config.json').write_text(text)
    assert run_folder(config, 'x') == tmp_path/'dtd'/run_id(config, 'x')


def test_a_name_needs_a_dataset():
    with pytest.raises(IpoError, match="add 'dataset' to its settings"): run_name(dict(steps=3), 'x')


@pytest.mark.parametrize('name', RunConfig.model_fields)
def test_each_field_says_what_it_is_for(name):
    field = RunConfig.model_fields[name]
    assert field.description and not field.description.endswith('.')
    assert sum(name in fields_for(role) for role in core.ROLES) == 1


def test_the_settings_of_a_card_are_those_of_the_configuration():
    for name, field in Settings.model_fields.items():
        whole = RunConfig.model_fields[name]
        assert (field.annotation, field.default, field.metadata) == (whole.annotation, whole.default, whole.metadata)
        assert field.description == whole.description
