"The guide `Add a language model` of CONTRIBUTING, followed to the letter: a toy that answers with a word of its own."
import pytest
from ipo_nb import llm as L
from ipo_nb import study
from ipo_nb.core import DEFAULT_PROMPT, IpoError, MetaPrompt, Reply, Scored

class Toy(L.LLM):
    "Puts one word before the best prompts that it is shown."
    reads = 'scored'                                             # 1. the form of the meta-prompt that it reads

    def __init__(self, word): self.word = word

    def __call__(self, meta, n, seed):                           # 2. the protocol: replies, no state
        best = [s.prompt for s in reversed(meta.scored)] or [DEFAULT_PROMPT]
        prompts = [f'{self.word} {i + seed % 7} {best[i % len(best)]}' for i in range(n)]
        return [Reply(f'<INS>{p}</INS>', calls=int(i == 0)) for i, p in enumerate(prompts)]

    def describe(self): return super().describe() | dict(word=self.word) # 3. what the manifest keeps of it

@pytest.fixture
def registered():
    @L.llm_scheme('toy:WORD')                                    # 4. the entry in the table of schemes
    def _toy(rest, sampling, **_): return Toy(rest)
    yield
    del L.LLMS['toy']

META = MetaPrompt('', '', (Scored(DEFAULT_PROMPT, 1.9, 41., 0),))

def test_it_is_named_asked_and_described(registered):
    toy = L.load_llm('toy:clear')
    assert toy(META, 2, 7) == toy(META, 2, 7) and len(toy(META, 3, 7)) == 3
    assert toy.describe() == dict(spec='toy:clear', reads='scored', word='clear')
    assert 'toy:WORD' in L.llm_forms()

@pytest.mark.parametrize('spec, says', [('toy', 'write it as toy:WORD'), ('tooy:x', "did you mean 'toy'")])
def test_a_mistake_names_the_mend(registered, spec, says):
    with pytest.raises(IpoError, match=says): L.load_llm(spec)

def test_a_study_records_and_replays_it(registered, tmp_path):
    def played(llm, folder):
        s = study.open_study(dict(dataset='mini_aerial', captioner='none', llm=llm, steps=2, control=False,
                                  out_dir=str(tmp_path/folder)))
        s.describe()
        s.search()
        s.run_control()
        s.finish()
        return s.folder
    first = played('toy:clear', 'first')
    again = played(f"replay:{first/'calls.jsonl'}", 'again')
    assert (again/'result.json').read_bytes() == (first/'result.json').read_bytes()
