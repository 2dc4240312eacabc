"""Record runs of 100 steps with the embedded LLM: `python tests/record.py [DATASET ...]` writes nbs/recordings/DATASET/{calls.jsonl,result.json}."""
import shutil, sys, tempfile
from pathlib import Path
from ipo_nb import study

for dataset in sys.argv[1:] or ['mini_textures', 'mini_objects', 'mini_aerial']:
    s = study.open_study(dict(dataset=dataset, llm='smollm2', captioner='clip', steps=100, candidates=5, memory=20, device='cpu', precision='fp32', out_dir=tempfile.mkdtemp()))
    print(s.intro()); s.describe(); s.search(); s.run_control(); s.finish()
    target = Path(__file__).resolve().parent.parent/'nbs'/'recordings'/dataset
    target.mkdir(parents=True, exist_ok=True)
    for name in ('calls.jsonl', 'result.json'): shutil.copy(s.folder/name, target/name)
    print(f'recorded {target}')
