"Checks of report that are no documentation: damaged records, awkward text, equal bytes."
import json
import shutil
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from ipo_nb.core import IpoError
from ipo_nb.evidence.records import load_record, made_up_record
from ipo_nb.evidence.report import figures, gallery, headline, write_report

NASTY = 'a $x_1$ photo_of <script>alert(1)</script> | `$5` [l](javascript:x) “façade” \\frac <CLASS>, 100% & **b**'

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return made_up_record(tmp_path_factory.mktemp('record')/'run', steps=4, k=3).path

@pytest.fixture
def copied(folder, tmp_path): # a record that a test may damage
    return shutil.copytree(folder, tmp_path/'run')

def images(rec):
    return [Image.new('RGB', (64, 48 + 8*i), (20*i, 90, 120)) for i in range(len(rec.result['few_shot']))]

def edit(path, without='', **changes): # result.json with other values, or without a key
    result = json.loads((path/'result.json').read_text()) | changes
    result.pop(without, None)
    (path/'result.json').write_text(json.dumps(result))
    return path

@pytest.mark.parametrize('changes, said', [
    (dict(format=0), 'has format 0 and this version reads format 1'),
    (dict(without='format'), 'has format None'),
    (dict(without='methods'), 'lacks methods')])
def test_older_format_no_format_missing_part(copied, changes, said):
    with pytest.raises(IpoError, match=said): load_record(edit(copied, **changes))

@pytest.mark.parametrize('text', ['', '[]', '{"format": 1', 'null', '3'])
def test_damaged_result(copied, text):
    (copied/'result.json').write_text(text)
    with pytest.raises(IpoError) as e: load_record(copied)
    assert '\n' not in str(e.value)

def test_unfinished_and_journal_less(copied):
    (copied/'history.jsonl').unlink()
    with pytest.raises(IpoError, match='no journal'): load_record(copied)
    (copied/'result.json').unlink()
    with pytest.raises(IpoError, match='no finished run'): load_record(copied)

def test_truncated_journal_line(folder, copied):
    with open(copied/'history.jsonl', 'a') as f: f.write('{"step": 5, "cand')
    assert len(load_record(copied).history) == len(load_record(folder).history)

def test_without_control_descriptions_or_template(copied):
    r = load_record(copied).result
    edit(copied, control=None, control_chosen=None, descriptions=[], methods=r['methods'][:2], paired=r['paired'][:3])
    (copied/'control.jsonl').unlink()
    rec = load_record(copied)
    assert write_report(rec).exists() and not (rec.path/'figures/gallery.png').exists()
    assert len(headline(rec)) == 2

def test_gallery_of_another_run(folder):
    rec = load_record(folder)
    with pytest.raises(IpoError, match='given 1'): gallery(rec, images(rec)[:1])

def test_awkward_text_is_escaped(tmp_path):
    names = ['a/b', 'c<d>', 'é"q"', '$x$', "it's", 'x|y']
    rec = made_up_record(tmp_path/'run', prompt=NASTY, names=names, steps=3)
    page = write_report(rec, images(rec)).read_text()
    md = (rec.path/'report.md').read_text()
    for text in (page, md, rec._repr_markdown_()):
        assert '<script' not in text and '<CLASS>' not in text and '<d>' not in text
    title, _, *table = (rec.path/'tables/methods.md').read_text().splitlines()
    assert title.startswith('**Test accuracy') and all(line.count('|') == 7 for line in table)
    assert '$' not in md and '](javascript' not in md
    assert NASTY in (rec.path/'tables/methods.csv').read_text().replace('""', '"')

def test_equal_bytes(tmp_path):
    def files(name):
        rec = made_up_record(tmp_path/name, steps=3)
        write_report(rec, images(rec))
        return {p.relative_to(rec.path): p.read_bytes() for p in rec.path.rglob('*') if p.is_file()}
    assert files('a') == files('b')

LENGTHS = ['<CLASS>', 'x'*300 + ' <CLASS>', ' '.join(['word']*60) + ' <CLASS>.', '<CLASS> 日本語']

@pytest.mark.parametrize('prompt', LENGTHS)
@pytest.mark.filterwarnings('ignore:Glyph')
def test_prompts_of_any_length(tmp_path, prompt):
    rec = made_up_record(tmp_path/'run', prompt=prompt, steps=1, k=1)
    assert all(len(f.data()) > 1000 for f in figures(rec).values())

def test_many_shots_show_one_image_a_class(tmp_path):
    rec = made_up_record(tmp_path/'run', names=[f'flower {i}' for i in range(102)], steps=2)
    base = rec.result['data']['base']
    rec.result['few_shot'] = [dict(key=f'{n}/{shot}', name=n) for n in base for shot in range(16)]
    fig = gallery(rec, [Image.new('RGB', (64, 64))]*len(rec.result['few_shot']))
    assert len(fig.axes) == 1 + 51

def check_inside(name, fig): # no text leaves the page
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw_without_rendering()
    for ax in fig.axes:
        for t in ax.texts:
            box = t.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= fig.bbox.x1, (name, t.get_text())
            assert box.y0 >= 0 and box.y1 <= fig.bbox.y1, (name, t.get_text())

LONG = ' '.join(['extraordinarily comprehensive, of']*15) + ' <CLASS>.'

@pytest.mark.parametrize('prompt', ['a <CLASS>.', LONG, 'MMMM'*40 + ' <CLASS>', 'W'*40 + ' ' + 'W'*45 + ' <CLASS>'])
def test_texts_stay_on_the_page(tmp_path, prompt):
    rec = made_up_record(tmp_path/'run', prompt=prompt, names=['W'*30, 'M M '*20, 'c', 'd'], steps=2)
    for name, fig in figures(rec, images(rec)).items(): check_inside(name, fig)
