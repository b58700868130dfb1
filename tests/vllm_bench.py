"""What `VLLMEngine` costs beside calling vLLM directly, and sixteen samples in one request beside sixteen requests.

python tests/vllm_bench.py STUDENT MESSAGES.json QUESTIONS ROUNDS      by the Python of vLLM's own environment; prints rows as JSON
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from octomed.generate.engine_vllm import VLLMEngine
from octomed.generate.engines import Request, Sampling, sample_seed

TOKENS = 16  # of every response: short, so that what is not the model shows


def main(student, messages, questions, rounds):
    questions, rounds, kinds = int(questions), int(rounds), json.loads(Path(messages).read_text())
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
    for kind, chats in kinds.items():
        asked = [
            Request(f"q{n}", chats[n % len(chats)], "p", tuple(range(16))) for n in range(questions)
        ]
        ways = {"vLLM, n=16 in one request": one, "vLLM, 16 requests": many, "VLLMEngine": ours}
        for way in ways.values():
            way(engine, asked)  # warm: image cache, allocations
        took = {w: [] for w in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                engine.llm.reset_prefix_cache()
                start = time.perf_counter()
                assert way(engine, asked) == 16 * questions, name
                took[name].append((time.perf_counter() - start) / (16 * questions) * 1e6)

        def row(what, who, x):
            return {
                "bench": f"engines, {kind}",
                "who": who,
                "what": what,
                "value": round(median(x), 1),
                "unit": "µs a sample",
                "interval": [round(min(x), 1), round(max(x), 1)],
            }

        rows += [
            row(f"{TOKENS} tokens, {16 * questions} samples", name, x) for name, x in took.items()
        ]
        rows += [
            row(
                "beside n=16 in one request",
                "VLLMEngine",
                [
                    a - b
                    for a, b in zip(
                        took["VLLMEngine"], took["vLLM, n=16 in one request"], strict=False
                    )
                ],
            )
        ]
        rows += [
            row(
                "its own Python, vLLM's calls left out",
                "VLLMEngine",
                [own(engine, asked) for _ in range(rounds)],
            )
        ]
    print("ROWS " + json.dumps(rows))


SHORT = Sampling(temperature=1.0, max_tokens=TOKENS)


def params(engine, seed, n=1):
    p = engine._params(SHORT, seed, TOKENS)
    p.n, p.ignore_eos = n, True
    return p


def prompt(engine, r):
    text, images, _ = engine._prompt(r.messages)
    from octomed.data.images import load_image

    return {
        "prompt": text,
        **(
            {
                "multi_modal_data": {"image": [load_image(h, engine.max_pixels) for h in images]},
                "multi_modal_uuids": {"image": images},
            }
            if images
            else {}
        ),
    }


def one(engine, asked):
    out = engine.llm.generate(
        [prompt(engine, r) for r in asked],
        [params(engine, sample_seed(SHORT, r.question, 0), 16) for r in asked],
        use_tqdm=False,
    )
    return sum(len(o.outputs) for o in out)


def many(engine, asked):
    made = [(prompt(engine, r), r) for r in asked]
    out = engine.llm.generate(
        [p for p, r in made for _ in r.indices],
        [params(engine, sample_seed(SHORT, r.question, i)) for _, r in made for i in r.indices],
        use_tqdm=False,
    )
    return len(out)


def ours(engine, asked):
    whole, engine._params = (
        engine._params,
        lambda s, seed, budget: (
            p := VLLMEngine._params(engine, s, seed, budget),
            setattr(p, "ignore_eos", True),
        )[0],
    )
    try:
        return sum(1 for _ in engine.generate(asked, SHORT))
    finally:
        engine._params = whole


def own(engine, asked):
    "Microseconds a sample outside of vLLM: the run's time less that of the three calls that are vLLM's."
    inside, core = [0.0], engine.llm.llm_engine

    def timed(f):
        def g(*a, **k):
            start = time.perf_counter()
            try:
                return f(*a, **k)
            finally:
                inside[0] += time.perf_counter() - start

        return g

    kept = core.add_request, core.step, engine.llm.renderer.render_cmpl
    core.add_request, core.step, engine.llm.renderer.render_cmpl = map(timed, kept)
    start = time.perf_counter()
    try:
        n = ours(engine, asked)
    finally:
        core.add_request, core.step, engine.llm.renderer.render_cmpl = kept
    return (time.perf_counter() - start - inside[0]) / n * 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
