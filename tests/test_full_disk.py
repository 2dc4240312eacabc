"A disk of 3 MB that is full in the middle of a run: not simulated. Where mounting is not allowed, nothing is tested."
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
import pytest

bin_ = Path(sys.executable).parent

@pytest.fixture
def disk(tmp_path):
    "A file system of 3 MB."
    try: done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', tmp_path], capture_output=True)
    except FileNotFoundError: pytest.skip('no mount here')
    if done.returncode: pytest.skip('mounting is not allowed here')
    yield tmp_path
    subprocess.run(['umount', '-l', tmp_path], check=True)

def fill(file):
    "Write until nothing more fits, at last byte by byte."
    with open(file, 'wb', buffering=0) as f:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True: f.write(b'\0'*size)

def command(disk):
    settings = dict(dataset='mini_aerial', llm='random', captioner='none', steps=20, out_dir=disk/'runs')
    out = [bin_/'ipo_run']
    for name, value in settings.items(): out += ['-p', name, str(value)]
    return out

def steps(disk): # in the journal
    return sum(f.read_bytes().count(b'\n') for f in disk.glob('runs/mini_aerial/*/history.jsonl'))

def test_a_disk_that_is_full_in_mid_run_ends_in_a_sentence_and_goes_on_after_space_is_made(disk):
    with subprocess.Popen(command(disk), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and steps(disk) < 4: time.sleep(.01)
        fill(disk/'filler')
        _, said = run.communicate()
    kept, last = steps(disk), said.strip().splitlines()[-1]
    assert run.returncode == 1 and 'Traceback' not in said
    assert last.startswith('ipo_run: cannot write ') and 'the disk is full: free some space' in last
    assert 4 <= kept < 21
    os.unlink(disk/'filler')
    again = subprocess.run(command(disk), capture_output=True, text=True)
    assert again.returncode == 0 and f'an earlier run was cut off after step {kept-1}' in again.stdout
    assert steps(disk) == 21 and list(disk.glob('runs/mini_aerial/*/report.html'))
