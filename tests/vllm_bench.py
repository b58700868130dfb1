"""The cost of `VLLMEngine` beside vLLM alone, and of one request for 16 samples beside 16 requests.

python tests/vllm_bench.py STUDENT MESSAGES.json QUESTIONS ROUNDS

Run it by the Python of vLLM's own environment. It prints rows as JSON.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from octomed.generate.engine_vllm import VLLMEngine
from octomed.generate.samples import Request, Sampling, derive_sample_seed

TOKENS = 16  # of every response: short, so that what is not the model shows
SHORT = Sampling(temperature=1.0, max_tokens=TOKENS)
IN_ONE = "vLLM, n=16 in one request"


def params(engine, seed, n=1):
    p = engine._params(SHORT, seed, TOKENS)
    p.n = n
    p.ignore_eos = True
    return p


def prompt(engine, request):
    from octomed.data.images import load_image

    text, images, _ = engine._prompt(request.messages)
    prompt = {"prompt": text}
    if images:
        loaded = [load_image(image, engine.max_pixels) for image in images]
        prompt["multi_modal_data"] = {"image": loaded}
        prompt["multi_modal_uuids"] = {"image": images}
    return prompt


def draw_in_one_request(engine, requests):
    outputs = engine.llm.generate(
        [prompt(engine, request) for request in requests],
        [params(engine, derive_sample_seed(SHORT, r.question, 0), n=16) for r in requests],
        use_tqdm=False,
    )
    return sum(len(output.outputs) for output in outputs)


def draw_in_many_requests(engine, requests):
    prompts, all_params = [], []
    for request in requests:
        shared = prompt(engine, request)
        for index in request.indices:
            prompts.append(shared)
            all_params.append(params(engine, derive_sample_seed(SHORT, request.question, index)))
    return len(engine.llm.generate(prompts, all_params, use_tqdm=False))


def draw_with_engine(engine, requests):
    "Our engine, with responses that do not end early."
    original = engine._params

    def without_end(sampling, seed, budget):
        p = original(sampling, seed, budget)
        p.ignore_eos = True
        return p

    engine._params = without_end
    try:
        return sum(1 for _ in engine.generate(requests, SHORT))
    finally:
        del engine._params


WAYS = {
    IN_ONE: draw_in_one_request,
    "vLLM, 16 requests": draw_in_many_requests,
    "VLLMEngine": draw_with_engine,
}


def measure_own_python(engine, requests):
    """Microseconds per sample outside of vLLM.

    This is the run's time without that of the three calls that are vLLM's."""
    inside, core, renderer = [0.0], engine.llm.llm_engine, engine.llm.renderer

    def timed(function):
        def call(*args, **kw):
            start = time.perf_counter()
            try:
                return function(*args, **kw)
            finally:
                inside[0] += time.perf_counter() - start

        return call

    kept = core.add_request, core.step, renderer.render_cmpl
    core.add_request, core.step, renderer.render_cmpl = map(timed, kept)
    start = time.perf_counter()
    try:
        n = draw_with_engine(engine, requests)
    finally:
        core.add_request, core.step, renderer.render_cmpl = kept
    return (time.perf_counter() - start - inside[0]) / n * 1e6


def measure_ways(engine, requests, rounds):
    "Microseconds per sample of each way, a list with one entry for each round."
    samples = 16 * len(requests)
    for draw in WAYS.values():
        draw(engine, requests)  # warm: image cache, allocations
    took = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, draw in WAYS.items():
            engine.llm.reset_prefix_cache()
            start = time.perf_counter()
            assert draw(engine, requests) == samples, name
            took[name].append((time.perf_counter() - start) / samples * 1e6)
    return took


def make_row(kind, what, who, values):
    return {
        "bench": f"engines, {kind}",
        "who": who,
        "what": what,
        "value": round(median(values), 1),
        "unit": "µs a sample",
        "interval": [round(min(values), 1), round(max(values), 1)],
    }


def measure_kind(engine, kind, requests, rounds):
    took = measure_ways(engine, requests, rounds)
    what = f"{TOKENS} tokens, {16 * len(requests)} samples"
    rows = [make_row(kind, what, who, values) for who, values in took.items()]
    beside = [ours - one for ours, one in zip(took["VLLMEngine"], took[IN_ONE], strict=True)]
    own = [measure_own_python(engine, requests) for _ in range(rounds)]
    rows.append(make_row(kind, "beside n=16 in one request", "VLLMEngine", beside))
    rows.append(make_row(kind, "its own Python, vLLM's calls left out", "VLLMEngine", own))
    return rows


def main(student, messages, questions, rounds):
    engine = VLLMEngine(
        student,
        "bench@1",
        max_pixels=12_544,
        max_model_len=2048,
        max_num_seqs=64,
        enforce_eager=True,
        block_size=32,
        distributed_executor_backend="uni",
    )
    rows = []
    for kind, chats in json.loads(Path(messages).read_text()).items():
        requests = [
            Request(f"q{n}", chats[n % len(chats)], "p", tuple(range(16)))
            for n in range(int(questions))
        ]
        rows += measure_kind(engine, kind, requests, int(rounds))
    print("ROWS " + json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
