#!/usr/bin/env python3
"""Writes tokenizer_cases.json: one small vocabulary, pre-tokenizers of published models, and the ids of `tokenizers`.

    python3 make_tokenizer_cases.py > tokenizer_cases.json                  (needs tokenizers 0.23)
    python3 make_tokenizer_cases.py 10000 > /tmp/many.json                  (more strings a variant)
"""
import json
import random
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|""" + TAIL]
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}%s]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}%s]"


def letters(exclusion):
    upper, lower = UPPER % exclusion, LOWER % exclusion
    head, end = r"[^\r\n\p{L}\p{N}]?", CONTRACTIONS + "?"
    return f"{head}{upper}*{lower}+{end}|{head}{upper}+{lower}*{end}|" + r"\p{N}{1,3}|"


KIMI = r"[\p{Han}]+|" + letters(r"&&[^\p{Han}]") + r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL
O200K = letters("") + r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + TAIL


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def level(use_regex=False, space=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=use_regex)


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


VARIANTS = {  # name: pre-tokenizer, normalizer, ignore_merges
    "gpt2": (level(True), None, False),
    "gpt2_prefix_space": (level(True, True), None, False),
    "smollm2": (sequence(pre_tokenizers.Digits(True), level(True)), None, False),
    "digit_runs": (sequence(pre_tokenizers.Digits(False), level(True)), None, False),
    "llama3": (sequence(split(LLAMA3), level()), None, True),
    "qwen": (sequence(split(LLAMA3.replace("{1,3}", "")), level()), normalizers.NFC(), False),
    "deepseek": (sequence(*[split(p) for p in DEEPSEEK], level()), None, False),
    "kimi": (sequence(split(KIMI), level()), None, True),
    "o200k": (sequence(split(O200K), level()), None, False),
    "removed": (sequence(split(r"\s+", "removed"), level()), normalizers.NFKC(), False),
    "previous": (sequence(split(r"[\p{P}]", "merged_with_previous"), level()), normalizers.NFD(), False),
    "next": (sequence(split(r"\s", "merged_with_next"), level()), normalizers.NFKD(), False),
    "contiguous": (sequence(split(r"\d", "contiguous"), level()), None, False),
    "inverted": (sequence(split(r"\w+|[^\w\s]+", "removed", True), level()), None, False),
    "literal": (sequence(pre_tokenizers.Split("a.", "isolated"), level()), None, False),
}
TEXT = [
    "It's we've they're I'm you'll he'd DON'T can't", "1 22 333 4444 55555 666666 7777777 ½ ² Ⅷ ٣٤ १२",
    "你好世界 中文分词 漢字かな交じり文 カタカナ ひらがな 한국어 텍스트", "e\u0301 a\u0308o\u0302 n\u0303 \u1e9b\u0323 ﬁ ½ Å é ñ",
    "😀😃 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽", "\ttab\tt\r\nline\r\n\n\n  indented   trailing   \n",
    "def f(x):\n    return x**2 # c\nfor (int i=0;i<n;++i) { a[i] = b->c; }\n", "Привет мир Γειά σου שלום مرحبا สวัสดี",
    "\u00a0\u2003\u3000\u200b\u180e\u0085\u2028\x1c\x0b \u1680", "ŞİĞ ǅ ʰ ª Ω K ſ 'ſ İ",
    "https://a.b/c?d=e&f=%20 <tag attr=\"v\"/> $x_{i}^2$ `code` ~~~ ### --- ...!?"]
ADDED = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<｜User｜>", "<m>", "wörd", "ab", "abc", "e\u0301x"]
CHARACTERS = [c for text in TEXT for c in text]


def any_character():
    # Assigned ones: newer versions of Unicode know more. The library's normalisation tables are older
    # still and lack the compatibility forms of U+32FF and of U+10780 to U+107BF.
    while True:
        code = random.choice([(32, 0x3000), (32, 0x3000), (0x3000, 0xD800), (0xE000, 0x1FBFF)])
        character = chr(random.randrange(*code))
        if unicodedata.category(character) != "Cn" and not 0x10780 <= ord(character) <= 0x107BF and character != "\u32ff":
            return character


def random_text():
    out = []
    for _ in range(random.randint(1, 12)):
        kind = random.random()
        if kind < 0.35:
            out.append(random.choice(CHARACTERS) * random.choice([1, 1, 1, 2, 3, 4]))
        elif kind < 0.6:
            text = random.choice(TEXT)
            at = random.randrange(len(text))
            out.append(text[at:at + random.randint(1, 12)])
        elif kind < 0.75:
            out.append(random.choice([" ", "  ", "\n", "\r\n", "\t", " \n "]))
        elif kind < 0.9:
            out.append(random.choice(["", "", " "]) + random.choice(ADDED) + random.choice(["", "", " "]))
        else:
            out.append(any_character())
    return "".join(out)


def around_added_tokens():
    base = "a b1 c"
    return [base[:i] + left + token + right + base[i:] for token in ADDED for i in range(len(base) + 1)
            for left in ("", " ") for right in ("", " ")]


def base_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = level()  # no splits, so that the vocabulary crosses every boundary
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False, max_token_length=6,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>", normalized=False),
                                  AddedToken("<｜User｜>", normalized=False)])
    tokenizer.add_tokens([
        AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False),
        AddedToken("<m>", lstrip=True, rstrip=True, normalized=False), AddedToken("wörd", single_word=True, normalized=True),
        AddedToken("ab"), AddedToken("abc"), AddedToken("e\u0301x", normalized=True)])
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|endoftext|> $A", pair="<|endoftext|> $A $B",
                                      special_tokens=[("<|endoftext|>", 0)])])
    return tokenizer


def main():
    random.seed(17)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    base = json.loads(base_tokenizer().to_str())
    base["model"]["merges"] = [" ".join(pair) for pair in base["model"]["merges"]]
    out = {"tokenizer": base, "variants": []}
    for name, (pre_tokenizer, normalizer, ignore_merges) in VARIANTS.items():
        tokenizer = Tokenizer.from_str(json.dumps(base))
        tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        full = json.loads(tokenizer.to_str())
        full["model"]["ignore_merges"] = ignore_merges
        tokenizer = Tokenizer.from_str(json.dumps(full))
        texts = [random_text() for _ in range(count)]
        texts += around_added_tokens() if count > 100 else random.sample(around_added_tokens(), 8)
        out["variants"].append({
            "name": name, "normalizer": full["normalizer"], "pre_tokenizer": full["pre_tokenizer"],
            "ignore_merges": ignore_merges,
            "cases": [[text, tokenizer.encode(text, add_special_tokens=False).ids] for text in texts]})
    json.dump(out, sys.stdout, ensure_ascii=True, separators=(",", ":"))
    print()


main()
