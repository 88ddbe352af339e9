"""RULER's synthetic tasks at any length (arXiv 2404.06654): structure, parameters and scoring are the paper's,
wording and filler text are this package's own.

``ruler_niah_single``, ``ruler_niah_multikey``, ``ruler_niah_multivalue``, ``ruler_niah_multiquery`` plant facts,
``ruler_vt`` assigns variables from variables, ``ruler_cwe`` and ``ruler_fwe`` ask for the most frequent words. A
length is in tokens of the model's own tokenizer and holds the whole prompt and the answer, as RULER's does. The chat
template is used where the model has one, and the answer is begun for the model behind it, as in RULER.

``ruler_qa`` hides the paragraph that answers a SQuAD question among others; it needs ``--data-dir`` with a SQuAD
file and runs only when asked for by name.
"""

from __future__ import annotations

from asymkv.longbench.suites import ruler_needles, ruler_qa, ruler_variables, ruler_words
from asymkv.longbench.suites.base import Suite

SUITE = Suite(
    "ruler",
    (*ruler_needles.BENCHMARKS, *ruler_variables.BENCHMARKS, *ruler_words.BENCHMARKS, *ruler_qa.BENCHMARKS),
    apart=frozenset({"ruler_qa"}),
)
