"Checks of report that are no documentation: damaged records, awkward text, equal bytes."
import json, shutil
import pytest
from PIL import Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from ipo_nb.core import IpoError
from ipo_nb.evidence.records import *
from ipo_nb.evidence.report import *
from ipo_nb.evidence.show import *

NASTY = 'a $x_1$ photo_of <script>alert(1)</script> | `$5` [l](javascript:x) “façade” \\frac <CLASS>, 100% & **b**'

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    f = tmp_path_factory.mktemp('record')/'run'; made_up_record(f, steps=4, k=3); return f

def images(rec): return [Image.new('RGB', (64, 48 + 8*i), (20*i, 90, 120)) for i in range(len(rec.result['few_shot']))]

def edit(folder, tmp_path, f, name='result.json'):
    new = tmp_path/'run'; shutil.copytree(folder, new)
    obj = json.loads((new/name).read_text()); f(obj); (new/name).write_text(json.dumps(obj)); return new

def test_older_format(folder, tmp_path):
    with pytest.raises(IpoError, match='has format 0 and this version reads format 1'): load_record(edit(folder, tmp_path, lambda r: r.update(format=0)))

def test_no_format(folder, tmp_path):
    with pytest.raises(IpoError, match='has format None'): load_record(edit(folder, tmp_path, lambda r: r.pop('format')))

def test_missing_part(folder, tmp_path):
    with pytest.raises(IpoError, match='lacks methods'): load_record(edit(folder, tmp_path, lambda r: r.pop('methods')))

@pytest.mark.parametrize('text', ['', '[]', '{"format": 1', 'null', '3'])
def test_damaged_result(folder, tmp_path, text):
    new = tmp_path/'run'; shutil.copytree(folder, new); (new/'result.json').write_text(text)
    with pytest.raises(IpoError) as e: load_record(new)
    assert '\n' not in str(e.value)

def test_unfinished_and_journal_less(folder, tmp_path):
    new = tmp_path/'run'; shutil.copytree(folder, new); (new/'history.jsonl').unlink()
    with pytest.raises(IpoError, match='no journal'): load_record(new)
    (new/'result.json').unlink()
    with pytest.raises(IpoError, match='no finished run'): load_record(new)

def test_truncated_journal_line(folder, tmp_path):
    new = tmp_path/'run'; shutil.copytree(folder, new)
    with open(new/'history.jsonl', 'a') as f: f.write('{"step": 5, "cand')
    assert len(load_record(new).history) == len(load_record(folder).history)

def test_without_control_descriptions_or_template(folder, tmp_path):
    def strip(r): r.update(control=None, control_chosen=None, descriptions=[], methods=r['methods'][:2], paired=r['paired'][:3])
    rec = load_record(edit(folder, tmp_path, strip)); (rec.path/'control.jsonl').unlink(); rec = load_record(rec.path)
    assert write_report(rec).exists() and not (rec.path/'figures/gallery.png').exists()
    assert len(headline(rec)) == 2

def test_gallery_of_another_run(folder):
    rec = load_record(folder)
    with pytest.raises(IpoError, match='given 1'): gallery(rec, images(rec)[:1])

def test_awkward_text_is_escaped(tmp_path):
    rec = made_up_record(tmp_path/'run', prompt=NASTY, names=['a/b', 'c<d>', 'é"q"', '$x$', "it's", 'x|y'], steps=3)
    page = write_report(rec, images(rec)).read_text(); md = (rec.path/'report.md').read_text()
    for text in (page, md, rec._repr_markdown_()): assert '<script' not in text and '<CLASS>' not in text and '<d>' not in text
    for line in (rec.path/'tables/methods.md').read_text().splitlines(): assert line.count('|') == 7
    assert '$' not in md and '](javascript' not in md
    assert NASTY in (rec.path/'tables/methods.csv').read_text().replace('""', '"')

def test_equal_bytes(tmp_path):
    def files(name):
        rec = made_up_record(tmp_path/name, steps=3); write_report(rec, images(rec))
        return {p.relative_to(rec.path): p.read_bytes() for p in rec.path.rglob('*') if p.is_file()}
    assert files('a') == files('b')

@pytest.mark.parametrize('prompt', ['<CLASS>', 'x'*300 + ' <CLASS>', ' '.join(['word']*60) + ' <CLASS>.', '<CLASS> 日本語'])
@pytest.mark.filterwarnings('ignore:Glyph')
def test_prompts_of_any_length(tmp_path, prompt):
    rec = made_up_record(tmp_path/'run', prompt=prompt, steps=1, k=1)
    assert all(len(f.data()) > 1000 for f in figures(rec).values())

def test_many_shots_show_one_image_a_class(tmp_path):
    names = [f'flower {i}' for i in range(102)]
    rec = made_up_record(tmp_path/'run', names=names, steps=2)
    rec.result['few_shot'] = [dict(key=f'{n}/{s}', name=n) for n in rec.result['data']['base'] for s in range(16)]
    fig = gallery(rec, [Image.new('RGB', (64, 64))]*len(rec.result['few_shot']))
    assert len(fig.axes) == 1 + 51

@pytest.mark.parametrize('prompt', ['a <CLASS>.', ' '.join(['extraordinarily comprehensive, of']*15) + ' <CLASS>.', 'MMMM'*40 + ' <CLASS>', 'W'*40 + ' ' + 'W'*45 + ' <CLASS>'])
def test_texts_stay_on_the_page(tmp_path, prompt):
    rec = made_up_record(tmp_path/'run', prompt=prompt, names=['W'*30, 'M M '*20, 'c', 'd'], steps=2)
    for name, fig in figures(rec, images(rec)).items():
        r = FigureCanvasAgg(fig).get_renderer(); fig.draw_without_rendering()
        for t in (t for ax in fig.axes for t in ax.texts):
            e = t.get_window_extent(r)
            assert e.x0 >= 0 and e.x1 <= fig.bbox.x1 and e.y0 >= 0 and e.y1 <= fig.bbox.y1, (name, t.get_text())
