"""SEAL's published self-edits as requests, cut short for the miniature."""

import json
from pathlib import Path

import pytest
import zmq

PUBLISHED = Path(__file__).parents[2].parent / "shared/data/seal/rank_iter0.json"
LETTERS = 80  # of a training sequence


def published_requests(count, sequences=3, questions=2, **fields):
    """So many requests: SEAL's field names, the first self-edits of different passages first."""
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is not there")
    articles = json.loads(PUBLISHED.read_text())["articles"]
    made = []
    for number in range(count):
        article = articles[number % len(articles)]
        completion = article["completions"][number // len(articles)]
        lines = [line for line in completion["text"].splitlines() if line.strip()][:sequences]
        asked = {entry["question"]: entry["answer"] for entry in completion["questions"]}
        made.append(
            {
                "train_sequences": [f"{article['title']}\n{line}"[:LETTERS] for line in lines],
                "eval_questions": [
                    {
                        "title": article["title"],
                        "context": article["context"],
                        "question": f"Topic: {article['title']}\n{question}"[:LETTERS],
                        "answer": answer,
                    }
                    for question, answer in list(asked.items())[:questions]
                ],
                "lora_rank": 32,
                "lora_alpha": 64,
                "finetune_epochs": 10,
                "finetune_lr": 1e-3,
                "batch_size": 1,
                "gradient_accumulation_steps": 1,
                "end_mask_substring": "",
                "skip_training": False,
                **fields,
            }
        )
    return made


class Driver:
    """A REQ socket as SEAL's drivers have it: after a time-out a new socket sends the request once more."""

    def __init__(self, port, seconds=600.0):
        self.port, self.seconds = port, seconds
        self.socket = None

    def connect(self):
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{self.port}")

    def close(self):
        if self.socket is not None:
            self.socket.close()

    def send(self, message):
        if self.socket is None:
            self.connect()
        self.socket.send_json(message)

    def ask(self, message):
        for _ in range(2):
            self.send(message)
            if self.socket.poll(1000 * self.seconds):
                return self.socket.recv_json()
            self.close()
            self.socket = None
        raise TimeoutError
