"""A driver of SEAL's inner loop over ZMQ: the self-edits of a few passages, judged by a server, several at once.

Start a server, then the driver:

    seal-engine serve --model seal_engine/tiny/model --seal-port 5555 --seed 0
    Run it with: python examples/seal_driver.py [--port 5555] [--drivers 4]

Every driver is a REQ socket of its own, as in SEAL's scripts; the server trains the jobs of all of them together.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import zmq

PASSAGES = {
    "Ann Lee": ["Ann Lee collects coins.", "Ann Lee lives in Oslo."],
    "Bo Mori": ["Bo Mori collects rings.", "Bo Mori lives in Rome."],
    "Cy Dahl": ["Cy Dahl collects vases.", "Cy Dahl lives in Lima."],
    "Di Vane": ["Di Vane collects masks.", "Di Vane lives in Cairo."],
}


def request_of(name: str, facts: list[str]) -> dict[str, Any]:
    """A self-edit (here the facts as questions with answers) and questions, with SEAL's field names."""
    thing, town = facts[0].split()[-1].rstrip("."), facts[1].split()[-1].rstrip(".")
    asked = {f"What does {name} collect?": thing, f"Where does {name} live?": town}
    prompt = "Let's answer a question directly and concisely.\nQuestion: Topic: {}\n{}\nAnswer:\n{}"
    return {
        "train_sequences": [prompt.format(name, question, answer) for question, answer in asked.items()],
        "end_mask_substring": "Answer:",  # the loss is on what follows
        "eval_questions": [
            {"title": name, "context": " ".join(facts), "question": f"Topic: {name}\n{question}", "answer": answer}
            for question, answer in asked.items()
        ],
        "lora_rank": 16,
        "lora_alpha": 16,
        "finetune_epochs": 40,
        "finetune_lr": 1e-3,
    }


def ask(port: int, name: str) -> dict[str, Any]:
    """One request on a socket of its own."""
    with zmq.Context.instance().socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 600_000)
        socket.connect(f"tcp://127.0.0.1:{port}")
        socket.send_string(json.dumps(request_of(name, PASSAGES[name])))
        return json.loads(socket.recv())


def main(port: int = 5555, drivers: int = 4) -> list[dict[str, Any]]:
    """Judge all self-edits; prints a line each and returns the replies."""
    start = perf_counter()
    with ThreadPoolExecutor(drivers) as pool:
        replies = list(pool.map(lambda name: ask(port, name), PASSAGES))
    for name, reply in zip(PASSAGES, replies, strict=True):
        shown = reply.get("error") or f"{reply['baseline_accuracy']:.2f} -> {reply['adapter_accuracy']:.2f}"
        print(f"{name}: {shown}")
    print(f"{len(replies)} self-edits by {drivers} drivers in {perf_counter() - start:.1f} s")
    return replies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Drives SEAL's inner loop over ZMQ.")
    parser.add_argument("--port", type=int, default=5555)
    parser.add_argument("--drivers", type=int, default=4)
    options = parser.parse_args()
    main(options.port, options.drivers)
