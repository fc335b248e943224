"""Makes minilm.npz: what transformers' BERT (torch) computes with all-MiniLM-L6-v2 for varied texts.

Run by hand in an environment with torch, transformers and safetensors (made with torch 2.13.0, transformers 5.23.0):
`python tests/goldens/make_minilm.py MODEL_FOLDER tests/goldens/minilm.npz`. The tests read the file and need none of these.
"""

import sys

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 128
LONG = 24  # texts of more tokens than that keep only some token vectors, so that the file stays small

TEXTS = [
    "lamp",
    "a",
    "7",
    ".",
    "",
    " ",
    "?!",
    "The Clockmaker's Orchard (1987). Drama, Mystery",
    "Seven Lanterns Under the Ice (2004). Adventure, Fantasy",
    "Night Ferry to Oslo (1962). Thriller",
    "Nobody Waters the Ferns (1999). Comedy",
    "Sergeant Marrow's Last Parade (1955). War, Drama",
    "Robots of the Salt Desert II: Rust Never Dreams (1994). Sci-Fi, Action",
    "La Maison sans Fenêtres (House Without Windows, The) (1971). Horror",
    "Der stille Müller (1931). Drama, Romance",
    "Ødegård: A Mountain Ghost Story (2016). Horror, Mystery",
    "Twelve Paper Cranes (2011). Animation, Children's",
    "The Understudy's Understudy (2019). Comedy, Musical",
    "Gunpowder & Marmalade (1978). Western, Comedy",
    "Harbour of Small Hours (1948). Film-Noir, Crime",
    "What the Beekeeper Knew (2008). Documentary",
    "Stainless steel garlic press, 18 cm, dishwasher safe",
    "Hyaluronic face serum 30 ml (1 fl. oz) with vitamin C & E",
    "Kids' rain boots, size EU 28 / US 11, yellow, waterproof",
    "USB-C to HDMI adapter, 4K@60Hz, aluminium, 15 cm cable",
    "Refill pack: 3 x 500 g lavender hand soap, unscented option available",
    "Cordless drill 18V 2.0Ah, 2 batteries, 74-piece bit set",
    "Argan oil shampoo for curly, colour-treated hair -- sulfate free!!!",
    "Noise-cancelling over-ear headphones; 40 h battery; Bluetooth 5.3",
    "Wooden train set, 120 pcs., ages 3+",
    "Matte lipstick 'Burnt Fig' no. 214",
    "Organic green tea, loose leaf, 250g tin [NEW DESIGN]",
    "Yoga mat 183 x 61 x 0.6 cm, non-slip, TPE",
    "LED strip 5 m RGB + remote (EU plug)",
    "Dog harness, S/M/L/XL, reflective",
    "Men's merino base layer top - charcoal - medium",
    "$12.99 clearance!!! 50% off, today only",
    "1234567890 0987654321 3.14159 1e-12 0xdeadbeef",
    "ISBN 978-0-00-000000-2, 2nd ed., pp. 1-418",
    "http://example.com/item?id=42&ref=abc#reviews",
    "user@example.org wrote: it's great, isn't it?",
    "UPPER lower MiXeD CamelCaseWord snake_case_word kebab-case-word",
    "naïve café résumé coöperate São Tomé Łódź Škoda İstanbul",
    "ﬁne ﬂoor ligatures, ½ cup, x² + y², № 5, ™ © ®",
    "東京の夜明け (2001年) ドラマ",
    "北京烤鸭 传统做法 家庭装",
    "서울의 봄, 한국 영화",
    "Ночной экспресс: тайна вагона № 7",
    "Η νύχτα των κρίνων",
    "ليلة في القاهرة",
    "שיר של ים",
    "नदी के उस पार",
    "คืนหนึ่งในกรุงเทพ",
    "🎬🍿 movie night 🌙✨",
    "👩‍🚀 astronaut plush toy 🚀🚀🚀",
    "♥ ♦ ♣ ♠ playing cards — 2 decks",
    "tab\tseparated\nand newlines\r\nin   one    title",
    "zero\u200bwidth\u00a0and\u3000wide spaces\ufeff",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "supercalifragilisticexpialidocious" * 4,
    "x" * 120,
    "the the the the the the the the the the",
    "...,,,;;;:::!!!???---___***+++===///\\\\\\|||~~~^^^%%%",
    "[CLS] [SEP] [MASK] [PAD] written out in a title",
    "If you liked Night Ferry to Oslo, Harbour of Small Hours and The Clockmaker's Orchard, then watch",
    "A retired lighthouse keeper finds a radio that still receives last year's broadcasts, and must decide whom to warn first.",
    "Two sisters run the last ice-cream van on an island where it has not been summer for nine years. " * 2,
    "This lightweight folding chair sets up in seconds, carries up to 120 kg, packs down to 35 cm and comes with a bag. " * 3,
    "A sweeping family chronicle across four generations of bell founders, told in reverse, from the silence back to the first note. " * 6,
    "词" * 200,
    "Cast: " + ", ".join(f"Actor {chr(65 + i % 26)}. Name{i}" for i in range(60)),
]


def main(model_folder: str, out: str) -> None:
    """Writes token ids, layer outputs and mean-pooled vectors of TEXTS; see the comments for the layout."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder, attn_implementation="eager", dtype=torch.float32).eval()
    rows = [tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"] for text in TEXTS]
    hidden, places, middle, pooled = [], [], [], []
    for row in rows:
        with torch.no_grad():
            result = model(
                input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), output_hidden_states=True
            )
        last = result.last_hidden_state[0].numpy()
        kept = np.arange(len(row)) if len(row) <= LONG else np.linspace(0, len(row) - 1, LONG).round().astype(int)
        hidden.append(last[kept])
        places.append(kept)
        middle.append(np.stack([layer[0, kept[len(kept) // 2]].numpy() for layer in result.hidden_states]))
        pooled.append(last.mean(0))
    np.savez_compressed(
        out,
        tokens=np.concatenate(rows).astype(np.int32),  # all texts end to end
        lengths=np.array([len(row) for row in rows], np.int32),
        places=np.concatenate(places).astype(np.int32),  # which tokens of each text have a vector in `hidden`, end to end
        kept=np.array([len(kept) for kept in places], np.int32),  # how many, per text
        hidden=np.concatenate(hidden),  # [sum(kept), D], last layer
        layers=np.stack(middle),  # [texts, layers + 1, D], all layers' output at the middle one of the kept tokens
        pooled=np.stack(pooled),  # [texts, D], mean over tokens, not normalised
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
