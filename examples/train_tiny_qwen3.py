"""Train the tiny dense Qwen3 model kept in ``examples/tiny-qwen3``, from nothing, on a CPU.

    python examples/train_tiny_qwen3.py --steps 1800 --out examples/tiny-qwen3

It downloads nothing. It builds a byte-level tokenizer and a model of one million parameters, trains the model on short
tales of twelve animals that a small grammar tells, and saves both as a folder for ``from_pretrained``. On two idle CPU
cores this takes about 11 minutes. The loss ends at 0.02 nats per byte, most of which is the grammar's own free choice.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

EOS, PAD = "<|endoftext|>", "<|pad|>"
IDS = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
PROMPTS = ("The fox sat by the river.", "Hello, my name is Hazel and", "Bruno the bear keeps a tally.")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Animal(NamedTuple):
    kind: str
    name: str
    home: str
    food: str
    mood: str


VALLEY = (
    Animal("fox", "Fen", "by the river", "blackberry", "quick"),
    Animal("owl", "Olga", "in the old oak", "moth", "wise"),
    Animal("bear", "Bruno", "in the cold cave", "plum", "gentle"),
    Animal("hare", "Hazel", "on the green hill", "carrot", "shy"),
    Animal("otter", "Otis", "under the bridge", "mussel", "playful"),
    Animal("mole", "Milo", "below the garden", "root", "patient"),
    Animal("wren", "Willa", "inside the hedge", "seed", "cheerful"),
    Animal("goat", "Greta", "on the high rock", "thistle", "stubborn"),
    Animal("frog", "Felix", "beside the pond", "cricket", "noisy"),
    Animal("mouse", "Minna", "behind the mill", "hazelnut", "careful"),
    Animal("swan", "Selma", "on the still lake", "reed", "proud"),
    Animal("crow", "Cato", "above the barn", "cherry", "clever"),
)


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def many(noun: str) -> str:
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def count(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun if number == 1 else many(noun)}"


class Teller:
    """Tells tales about one animal; each method is one kind of tale."""

    def __init__(self, rng: random.Random, who: int) -> None:
        self.rng, self.who, self.turn = rng, who, 0
        self.me, self.friend = VALLEY[who % 12], VALLEY[(who + 5) % 12]

    def pick(self, options: Sequence[Any]) -> Any:
        """Choose with a clear favourite, which depends on the animal and on the place in the tale."""
        self.turn += 1
        return options[(self.who + self.turn + int(self.rng.expovariate(0.9))) % len(options)]

    def story(self) -> str:
        me, friend, day = self.me, self.friend, self.pick(range(7))
        start = self.pick((f"Once upon a time {a(me.kind)} lived {me.home}", f"The {me.kind} sat {me.home}"))
        weather = self.pick(("The sun was warm", "A soft rain fell", "The wind was still", "Snow lay all around"))
        found, gave = self.pick(range(4, 10)), self.pick(range(1, 4))
        thanks = self.pick(("a blue feather", "a silver bell", "a round stone", "a paper boat", "a red button"))
        ending = self.pick(("sang until the moon rose", "danced in the grass", "told old riddles", "watched the stars"))
        return (
            f"{start}. {weather}, and the {me.kind} was {me.mood} as ever. On {DAYS[day]} the {me.kind} found "
            f'{count(found, me.food)}. "That is too much for me," said the {me.kind}, and gave '
            f"{count(gave, me.food)} to {friend.name} the {friend.kind}, so {count(found - gave, me.food)} remained. "
            f"On {DAYS[(day + 1) % 7]} {friend.name} came back with {thanks}, and the two friends {ending}."
        )

    def hello(self) -> str:
        me, friend = self.me, self.friend
        meal = self.pick(("breakfast", "lunch", "supper"))
        wish = self.pick(("see the sea", "learn to whistle", "build a boat", "read the stars"))
        return (
            f"Hello, my name is {me.name} and I am {a(me.kind)}. I live {me.home}, and I eat "
            f"{count(self.pick(range(2, 7)), me.food)} for {meal}. People say that I am {me.mood}. My best friend is "
            f"{friend.name} the {friend.kind}, who lives {friend.home} and is very {friend.mood}. One day we want to "
            f"{wish} together. Come and visit us on {self.pick(DAYS)}!"
        )

    def questions(self) -> str:
        return " ".join(
            f"Where does the {x.kind} live? The {x.kind} lives {x.home}. What does the {x.kind} eat? "
            f"The {x.kind} eats {many(x.food)}. What is the {x.kind} called? It is called {x.name}."
            for x in (self.me, self.friend)
        )

    def visits(self) -> str:
        day, text = self.pick(range(7)), f"{self.me.name} the {self.me.kind} went to see the neighbours."
        for i in range(1, 5):
            host = VALLEY[(self.who + i) % 12]
            meeting = f"the {self.me.kind} met {host.name} the {host.kind} {host.home}"
            text += f" On {DAYS[(day + i) % 7]} {meeting} and they ate {count(i, host.food)}."
        return f"{text} Then it was time to go home."

    def tally(self) -> str:
        me, have = self.me, self.pick(range(2, 6))
        text = f"{me.name} the {me.kind} keeps a tally. At first there are {count(have, me.food)}."
        for when in ("In the morning", "At noon", "In the evening", "At night"):
            gain = self.pick((2, -1, 3, -2, 1))
            gain = gain if 1 <= have + gain <= 12 else -gain
            deed, sign = ("finds", "and") if gain > 0 else ("eats", "less")
            sides = f"{NUMBERS[have]} {sign} {NUMBERS[abs(gain)]} makes {NUMBERS[have + gain]}"
            text += f" {when} {me.name} {deed} {count(abs(gain), me.food)}, and {sides}."
            have += gain
        return f"{text} {me.name} is {self.pick(('glad', 'sleepy', 'content'))}."


TALES = (Teller.story, Teller.hello, Teller.questions, Teller.visits, Teller.tally)


def texts(seed: int, length: int = 600) -> Iterator[str]:
    """Yield texts of 512 tokens and more, in which each tale leads on to another animal and another kind of tale."""
    rng = random.Random(seed)
    while True:
        who, kind, text = min(rng.randrange(12), rng.randrange(12)), rng.choice((0, 0, 1, 2, 3, 4)), ""
        while len(text) < length:
            text += TALES[kind % 5](Teller(rng, who % 12)) + EOS
            who, kind = who + 7, kind + 1
        yield text


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, with the byte's value for an id, then the two special tokens."""
    printable, hidden = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}, iter(range(0x100, 0x200))
    vocab = {chr(byte if byte in printable else next(hidden)): byte for byte in range(0x100)}  # GPT-2's byte alphabet
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    rates = [min(1, (i + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * i / steps)) for i in range(steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates.__getitem__)
    source, begun = texts(seed=0), time.time()
    for step in range(1, steps + 1):
        ids = torch.tensor([tokenizer(next(source)).input_ids[:512] for _ in range(8)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}, loss {loss.item():.4f}, {time.time() - begun:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Qwen3 model of the examples.")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-qwen3")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # head_dim is not 128 / 4
    sizes = {"vocab_size": 264, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4} | heads
    model = Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=512, tie_word_embeddings=True, **sizes, **IDS))
    train(model, tokenizer := build_tokenizer(), args.steps)

    model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(do_sample=False, **IDS)
    model.save_pretrained(args.out)
    tokenizer.backend_tokenizer.save(str(args.out / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD, "padding_side": "left"}
    names |= {"model_max_length": 512, "model_input_names": ["input_ids", "attention_mask"]}
    (args.out / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    for prompt in PROMPTS:
        out = model.generate(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), max_new_tokens=360)
        top = model(input_ids=out).logits[0, len(prompt) - 1 : -1].float().softmax(-1).amax(-1).mean().item()
        print(f"\n{tokenizer.decode(out[0])}\n[mean probability of the greedy tokens: {top:.3f}]")


if __name__ == "__main__":
    main()
