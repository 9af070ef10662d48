# Everything sets itself up in .venv on first use: `demo` takes what an edit needs, `serve` the service too, the rest all tools.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
BASE := .venv/.base
SERVICE := .venv/.service
READY := .venv/.ready
# The CPU build of torch. `make demo TORCH_INDEX=` takes the build that pip takes by itself: on Linux CUDA's, of several GB.
# A folder of wheels in PIP_FIND_LINKS comes first.
TORCH_INDEX ?= $(if $(PIP_FIND_LINKS),,https://download.pytorch.org/whl/cpu)
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo docs first-hour serve attack fuzz test test-clients test-gpu-kernels test-ray test-recipes test-newest check format bench bench-whole bench-openvino benchmarks eval eval-formats gallery clean

$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Limner needs Python 3.11 or newer, and $(PYTHON) is ' + \
	    sys.version.split()[0] + '; name another one: make $(MAKECMDGOALS) PYTHON=python3.12')"
	@echo "Setting up .venv, once: 1 to 5 minutes, 270 MB to download, 1.2 GB on disk."
	@echo "1 of 3: an empty environment"
	$(PYTHON) -m venv .venv
	@echo "2 of 3: torch$(if $(TORCH_INDEX),$(comma) the CPU build)"
	$(PIP_INSTALL) --no-deps torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "3 of 3: Limner and what it needs"
	$(PIP_INSTALL) -e .
	@touch $(BASE)

$(SERVICE): pyproject.toml constraints.txt | $(BASE)
	@echo "Setting up the service in .venv, once: a minute, 60 MB to download, 190 MB on disk."
	$(PIP_INSTALL) -e '.[serve]'
	@touch $(SERVICE)

$(READY): pyproject.toml constraints.txt | $(BASE)
	@echo "Setting up the tools of development in .venv, once: 2 to 5 minutes, 2.7 GB more on disk. pip is silent meanwhile."
	$(PIP_INSTALL) --quiet -e '.[dev,recipes]'
	@touch $(READY)

demo: $(BASE)
	@mkdir -p build
	@echo "Drawing, a few seconds: the cat of one sample on the beach of another."
	$(BIN)/limner edit "use the background of image 2" \
	    -i src/limner/assets/samples/cat.png -i src/limner/assets/samples/beach.png -o build/demo.png --seed 1
	@echo
	@echo "The picture: $(CURDIR)/build/demo.png"
	@echo "Try next, in this folder:"
	@echo "    . .venv/bin/activate"
	@echo "    limner samples"
	@echo "    limner edit 'put the dog from image 2 into image 1 on the left' -i samples/meadow.png -i samples/dog.png"
	@echo "or a page to work in, in the browser: make serve"

serve: $(SERVICE)
	$(BIN)/limner serve

FONT := recipes/stickers/build/NotoColorEmoji.ttf

$(FONT):
	bash recipes/stickers/run.sh font

test: $(READY) $(FONT)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not ray and not recipe and not clients"

# Published clients against the service, in build/clients: Node's by npm, LiteLLM in a Python of its own. And axe on the page.
test-clients: $(READY)
	mkdir -p build/clients
	cp tests/contract/clients/package.json build/clients/
	-cd build/clients && npm install --no-audit --no-fund --loglevel=error
	-test -x build/clients/litellm/bin/litellm || { $(PYTHON) -m venv build/clients/litellm && \
	    build/clients/litellm/bin/pip install --quiet --disable-pip-version-check litellm==1.110.2; }
	$(BIN)/python -m pytest -rs -m clients tests/contract/test_clients.py tests/contract/test_page_axe.py

# The Triton kernels compiled for every card, without one; prints registers, shared memory and spills (a few minutes).
test-gpu-kernels: $(READY)
	LIMNER_COMPILE=1 $(BIN)/python -m pytest -s tests/unit/model/gpu

# Start and stop Ray clusters on this machine, one test after another.
test-ray: $(READY)
	$(BIN)/python -m pytest -m ray

# The whole recipe of the bundled model in miniature, processes after processes.
test-recipes: $(READY) $(FONT)
	$(BIN)/python -m pytest -m recipe

# The newest torch, transformers and diffusers, whatever constraints.txt says, in an environment of its own: for a run a week,
# `make test-newest PYTHON=python3.13`. The digests of pictures are those of the pinned versions and are left out.
NEWEST := .venv-newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[serve,postgres]' \
	    pytest httpx peft accelerate
	$(NEWEST)/bin/python -c "import sys, torch, transformers, diffusers; print('Python', sys.version.split()[0], 'torch', \
	    torch.__version__, 'transformers', transformers.__version__, 'diffusers', diffusers.__version__)"
	$(NEWEST)/bin/python -m pytest tests/numerics tests/unit/model tests/unit/pipeline tests/unit/weights tests/unit/images \
	    tests/unit/references tests/contract/test_diffusers_habits.py tests/contract/test_card_example.py

check: $(READY) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site in build/site; every link has to lead somewhere.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/limner bench -o benchmarks/results/edit.json

# Calls from a prompt to PNG at klein-4B's size: 21 GiB of free memory, and about 10 minutes on 2 cores.
bench-whole: $(READY)
	$(BIN)/limner bench --whole klein-4b --references 1 --engines diffusers_kv warm int8_warm --rounds 3 \
	    -o benchmarks/results/whole.json

# A step beside OpenVINO, in an environment of its own (build/openvino-venv, 1.7 GB).
bench-openvino: $(READY)
	$(BIN)/python benchmarks/openvino_step.py -o benchmarks/results/openvino_step.json

# All benchmarks but those of full size (benchmarks/full_size.py, bench-whole) and bench-openvino: over an hour on 2 cores, with nothing else running.
benchmarks: $(READY) bench
	$(BIN)/python benchmarks/memory.py -o benchmarks/results/memory.json
	$(BIN)/python benchmarks/store.py -o benchmarks/results/store.json
	$(BIN)/python benchmarks/canvas.py -o benchmarks/results/canvas.json
	$(BIN)/python benchmarks/autoencoder.py -o benchmarks/results/autoencoder.json
	$(BIN)/python benchmarks/int8_error.py -o benchmarks/results/int8_error.json
	$(BIN)/python benchmarks/int8_text.py --layers 6 -o benchmarks/results/int8_text.json
	$(BIN)/python benchmarks/tiles.py -o benchmarks/results/tiles.json
	$(BIN)/python benchmarks/overlap.py -o benchmarks/results/overlap.json
	$(BIN)/python benchmarks/scaling.py -o benchmarks/results/scaling
	$(BIN)/python benchmarks/routing.py -o benchmarks/results/routing
	$(BIN)/python benchmarks/attack.py -o benchmarks/results/attack.json
	$(BIN)/python benchmarks/serve_load.py -o benchmarks/results/serve_load.json
	$(BIN)/python benchmarks/serve_kills.py --queued 5000 -o benchmarks/results/serve_kills.json
	$(BIN)/python benchmarks/resident.py -o benchmarks/results/resident.json
	$(BIN)/python benchmarks/batch.py -o benchmarks/results/batch.json
	$(BIN)/python benchmarks/deploy.py -o benchmarks/results/deploy.json

# What one caller can do to the others: each attack for 8 seconds, about 10 minutes with nothing else running.
attack: $(READY)
	$(BIN)/python benchmarks/attack.py -o benchmarks/results/attack.json

# Send more random requests than `make test` does, and compare the answers with the OpenAPI document.
fuzz: $(READY)
	LIMNER_FUZZ=500 $(BIN)/python -m pytest tests/contract/test_schema.py

eval: $(READY) $(FONT)
	$(BIN)/python recipes/stickers/evaluate.py

# Run the evaluation once for each format of weights, activations and K/V.
eval-formats: $(READY) $(FONT)
	$(BIN)/python recipes/stickers/quantization.py --write

gallery: $(READY) $(FONT)
	$(BIN)/python recipes/stickers/gallery.py

# Type README and the guides in a new environment outside of the checkout, and say minutes and megabytes of each step.
first-hour: $(READY)
	$(BIN)/python tests/first_hour/run.py -o benchmarks/results/first_hour.json

clean:
	rm -rf .venv .venv-newest build
