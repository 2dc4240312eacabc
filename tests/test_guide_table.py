"CONTRIBUTING's guide `Add a table of the paper`, followed: a toy table, its files, and its row of the map."
from itertools import chain, product
from ipo_nb.evidence.compare import answers, check_alike, family, gather, versus, with_best
from ipo_nb.evidence.records import made_up_shelf
from ipo_nb.evidence.show import Table, Writer
from ipo_nb.paper.map import map_state, needed

COMMAND = 'ipo_sweep peers'


def wins_table(runs): # a row a dataset: IPO, its control, and whether the two can be told apart
    runs, notes = family(runs)
    check_alike(runs)
    cells = gather([*chain.from_iterable(map(answers, runs))], lambda a: (a['dataset'], a['method']))
    rows = []
    for dataset in dict.fromkeys(d for d, _ in cells):
        block = {m: cells[dataset, m] for m in ('ipo', 'random')}
        numbers = with_best(block)
        p = versus(block['ipo'], block['random'])
        rows.append(dict(dataset=dataset, IPO=numbers['ipo']['h'], control=numbers['random']['h'], p=p))
    return Table('wins', 'IPO and its control', rows, notes=tuple(notes), command=COMMAND)


def test_a_table_from_records(tmp_path):
    shelf = made_up_shelf(tmp_path/'records')
    show = Writer(tmp_path)
    table = show(wins_table(shelf.runs))
    assert [r['dataset'] for r in table.rows] == ['plates', 'shells'] and all(r['p'] < .05 for r in table.rows)
    assert '<b>' in table.markdown() and table.csv().splitlines()[0].startswith('dataset,IPO,IPO_sd,IPO_low')
    assert sorted(p.name for p in (tmp_path/'tables').iterdir()) == ['wins.csv', 'wins.md', 'wins.tex']


def test_without_records_it_names_its_command(): assert COMMAND in wins_table([]).markdown()


def test_its_row_of_the_map():
    row = dict(paper='table 30', shows='wins', command=COMMAND, section='Wins', notebook='tables_and_figures.ipynb',
               state='embedded', needs=dict(kind='search', dataset=['plates', 'shells'], seeds=3))
    records = [dict(kind='search', dataset=d, seed=s) for d, s in product(('plates', 'shells'), (1, 2, 3))]
    assert map_state(row, records) == 'embedded record committed'
    assert needed(row['needs'], records[:3]) == 'dataset shells with 3 seeds'
