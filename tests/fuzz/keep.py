"""Keeps some of what a target found its way to, for the crates' own tests: python keep.py TARGET FOLDER.

FOLDER holds a corpus that the target merged (`-merge=1 -use_counters=0 -use_cmp=0`), so that no two inputs take the same way. Short ones
of all lengths go into found/TARGET, one a line, in hexadecimal.
"""

import pathlib
import sys

COUNT, LONGEST = 64, 400

target, folder = sys.argv[1:]
inputs = sorted((path.read_bytes() for path in pathlib.Path(folder).iterdir()), key=lambda content: (len(content), content))
inputs = [content for content in inputs if 0 < len(content) <= LONGEST]
chosen = [inputs[at * len(inputs) // COUNT] for at in range(COUNT)] if len(inputs) > COUNT else inputs
found = pathlib.Path(__file__).parent / "found"
found.mkdir(exist_ok=True)
(found / target).write_text("".join(content.hex() + "\n" for content in chosen))
