# The two commands of the README: `make demo` and `make test`.
#
# Everything is stamped: a second `make demo` neither installs, nor builds data,
# nor trains, unless a file that it depends on has changed.

VENV ?= .venv
PYTHON ?= python3

python := $(VENV)/bin/python
installed := $(VENV)/.installed

demo := data/demo
demo_dataset := $(demo)/datasets/demo_sp1024
demo_tokenizer := $(demo)/tokenizers/fineweb_1024_bpe.model
demo_corpus_flags := --out $(demo)/text
demo_shard_flags := --train $(demo)/text/train.jsonl --val $(demo)/text/val.jsonl --train-tokenizer 1024 --name demo_sp1024 --out $(demo)
demo_recipe := records/recipes/demo.env
demo_log := logs/demo.txt
# The lines of a log that say how it ended: score, size, time, anything that never took part.
demo_outcome := ^(final_|quantized_|legal_ttt)[^ ]* .*val_bpb:|^Total submission size|^stopping_early|^total_eval_time
demo_outcome := $(demo_outcome)|^step:[0-9]+/[0-9]+ val_loss|never activated|^budget

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
	    printf '%-14s %s\n' "$$target" "$$text"; done
	@echo "  VENV=DIR (now $(VENV)) is the environment, PYTHON=EXE (now $(PYTHON)) makes it"

demo: logs/demo.png  ## train, quantize and score a small model on this machine (minutes on a CPU)
	@echo
	@echo "how the demo ended ($(demo_log)):"
	@grep -E '$(demo_outcome)' $(demo_log) | tail -n 12
	@echo "its curves: logs/demo.png"

test: $(installed)  ## run the tests
	$(python) -m pytest -q -n auto --dist loadfile --max-worker-restart 0 tests

clean:  ## remove the demo's data and logs and the caches, keep the environment
	rm -rf $(demo) .pytest_cache
	rm -f logs/demo.*
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path '$(VENV)/*' -prune -exec rm -rf {} +

# One pip call, so that torch and everything that depends on it are resolved together.
# An environment that is there but has no working pip (an interrupted start) is completed.
$(installed): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install -r requirements-dev.txt
	touch $@

$(demo)/.complete: data/demo_corpus.py data/build_shards.py data/caseops.py data/console.py data/shards.py | $(installed)
	rm -rf $(demo)
	$(python) data/demo_corpus.py $(demo_corpus_flags)
	$(python) data/build_shards.py $(demo_shard_flags)
	touch $@

# The old log goes first: a run that fails must not leave the last one's lines to be read as its own.
logs/demo.jsonl: train_gpt.py $(demo_recipe) $(demo)/.complete | $(installed)
	rm -f $(demo_log) $@
	RECIPE=$(demo_recipe) RUN_ID=demo OVERWRITE=1 DATA_PATH=$(demo_dataset) TOKENIZER_PATH=$(demo_tokenizer) $(python) train_gpt.py

logs/demo.png: logs/demo.jsonl records/writing/plot.py
	$(python) -m records plot logs/demo.jsonl -o $@
