"""What the tests of readers share: configs, small files, one MovieLens data set in each of its layouts."""

import gzip

from rec_jax import config as config_lib


def data(reader, path, items="", columns=None, **on_bad):
    """`config.data` of a reader."""
    c = config_lib.defaults().data
    c.reader, c.path = reader, str(path)
    c["items"] = str(items)
    c.columns.update(columns or {})
    c.on_bad.update(on_bad)
    return c


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode(encoding) if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def rows(frame, *columns):
    return frame.select(columns).rows()


FLAGS = "|".join("1" if i in (1, 5) else "0" for i in range(19))
UNKNOWN = "|".join("1" if i == 0 else "0" for i in range(19))
LAYOUTS = {
    "100k": {
        "u.data": "1\t10\t4\t100\n2\t20\t5\t50\n1\t20\t3\t90\n",
        "u.item": f"10|Misérables, Les (1995)|01-Jan-1995||http://x|{FLAGS}\n20|unknown||||{UNKNOWN}\n",
        "u.user": "2|53|F|other|94043\n1|24|M|technician|85711\n",
    },
    "1m": {
        "ratings.dat": "1::10::4::100\n2::20::5::50\n1::20::3::90\n",
        "movies.dat": "10::Misérables, Les (1995)::Action|Comedy\n20::unknown::unknown\n",
        "users.dat": "2::F::53::3::94043\n1::M::24::4::85711\n",
    },
    "csv": {
        "ratings.csv": "userId,movieId,rating,timestamp\r\n1,10,4.0,100\r\n2,20,5.0,50\r\n1,20,3.0,90\r\n",
        "movies.csv": 'movieId,title,genres\r\n10,"Misérables, Les (1995)",Action|Comedy\r\n20,unknown,(no genres listed)\r\n',
    },
}


def encode(layout, text):
    return text.encode("utf-8" if layout == "csv" else "latin-1")


REVIEWS = {
    "2018": (
        [
            {"reviewerID": "A", "asin": "P1", "overall": 5.0, "unixReviewTime": 100},
            {"reviewerID": "B", "asin": "P2", "overall": 1, "unixReviewTime": 7},
        ],
        {
            "asin": "P1", "title": "Salt &amp; Pepper", "brand": "Acme", "category": ["Food", "Spices"],
            "description": ["<b>Fine</b>", "salt."],
        },
    ),
    "2023": (
        [
            {"user_id": "A", "parent_asin": "P1", "rating": 5.0, "timestamp": 100999},
            {"user_id": "B", "parent_asin": "P2", "rating": 1, "timestamp": 7000},
        ],
        {
            "parent_asin": "P1", "title": "Salt & Pepper", "store": "Acme", "categories": ["Food", "Spices"],
            "description": ["Fine"], "features": ["salt."],
        },
    ),
}  # fmt: skip

BEHAVIORS = [
    "1\tU1\t11/15/2019 1:00:05 PM\tN1 N2\tN3-0 N4-1",
    "2\tU2\t11/15/2019 1:00:00 PM\t\tN1-1 N2-0",
    "3\tU1\t11/15/2019 12:00:00 PM\tN1 N2\tN5-1 N3-1",
]

NEWS = "".join(f"N{i}\tnews\tworld\tTitle {i}\t\thttp://x\t[]\t[]\n" for i in range(1, 6))
