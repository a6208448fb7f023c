"""Domain tables: tools, films, instruments, boats and apps."""

from __future__ import annotations

from descriptions.phrases import Domain, each, have, names, neg, post, pre, verb

TOOL = Domain(
    key="tool",
    names=names(
        "{} {}",
        first="Bortan Corvane Delko Drevik Fassbar Gantrix Hollin Kestor Norvik Rastok Tavrik "
        "Wendt",
        second="C4 D20 K7 M12 S90 X3",
        unseen="Ardin Jorrick Zelmar",
    ),
    types=(
        "cordless drill",
        "circular saw",
        "hedge trimmer",
        "angle grinder",
        "belt sander",
        "heat gun",
    ),
    slots={
        "power": each("450 W, 600 W, 750 W, 800 W, 1,100 W", pre("{v}"), verb("is rated at {v}")),
        "weight": each("0.9 kg, 1.4 kg, 1.8 kg, 2.3 kg, 3.1 kg, 4 kg", verb("weighs {v}")),
        "noise": each(
            "68 dB, 74 dB, 82 dB, 88 dB, 95 dB",
            verb("makes {v} of noise"),
            verb("reaches {v} in use"),
        ),
        "price": each("£39, £55, £69, £84, £120, £165", verb("costs {v}"), verb("sells for {v}")),
        "warranty": {
            **each("one-year, two-year, three-year, five-year", have("{a} warranty")),
            "none": (neg("has no warranty"), neg("carries no warranty")),
        },
        "case": {
            "included": (verb("comes in a carry case"), have("a carry case")),
            "no": (neg("comes without a case"), neg("is sold without a case")),
        },
    },
    plans=("relative", "apposition", "semicolon"),
    contrast=" but ",
)

FILM = Domain(
    key="film",
    names=names(
        "The {} {}",
        first="Borrowed Broken Distant Empty Glass Golden Hidden Last Quiet Salt Second Winter",
        second="Garden Letter Orchard Passenger Station Tide",
        unseen="Crimson Hollow Midnight",
    ),
    types=("thriller", "comedy", "documentary", "western", "drama", "animated film", "ghost story"),
    slots={
        "year": each(
            "1938, 1952, 1964, 1971, 1985, 1999, 2012", pre("{v}"), verb("dates from {v}")
        ),
        "language": each(
            "Polish, Icelandic, Korean, Italian, Arabic, Portuguese",
            pre("{v}-language"),
            verb("is in {v}"),
        ),
        "director": each(
            "Ana Ferro, Pavel Lindqvist, Ruth Okoye, Tomas Varga, Mei Sandoval, Iris Holloway",
            post("by {v}"),
            post("directed by {v}"),
        ),
        "length": each(
            "78 minutes, 88 minutes, 96 minutes, 105 minutes, 124 minutes, 151 minutes",
            verb("runs for {v}"),
            verb("lasts {v}"),
        ),
        "setting": {
            **each("Lisbon, Trieste, Glasgow", verb("is set in {v}"), verb("takes place in {v}")),
            **each(
                "mining town, circus, lighthouse, Arctic station",
                verb("is set in {a}"),
                verb("takes place in {a}"),
            ),
        },
        "children": {
            "yes": (verb("is suitable for children"), verb("can be watched with children")),
            "no": (neg("is not suitable for children"), neg("is not meant for children")),
        },
    },
    plans=("apposition", "joined"),
    contrast=" but ",
)

INSTRUMENT = Domain(
    key="instrument",
    names=names(
        "{} {}",
        first="Aldine Brennan Casari Dorrance Ellwood Fenner Harcourt Lindon Merrow Pascoe Rigby "
        "Tallis",
        second="Finch Lark Linnet Nightingale Robin Wren",
        unseen="Ivory Quennell Umbria",
    ),
    types=("acoustic guitar", "banjo", "mandolin", "ukulele", "violin", "cello"),
    slots={
        "condition": each("brand-new, second-hand, restored, unused, antique", pre("{v}")),
        "wood": each("walnut, maple, cherry, ash, mahogany", pre("{v}"), verb("is made of {v}")),
        "tone": each("warm, bright, mellow, open", have("{a} tone"), verb("has {a} tone")),
        "level": each(
            "beginners, improvers, professionals, young players",
            verb("suits {v}"),
            verb("is aimed at {v}"),
        ),
        "price": each(
            "£95, £180, £240, £420, £650, £1,100", verb("costs {v}"), verb("is priced at {v}")
        ),
        "left-handed": {
            "yes": (verb("comes in a left-handed version"), verb("can be had left-handed")),
            "no": (
                neg("does not come in a left-handed version"),
                neg("cannot be had left-handed"),
            ),
        },
    },
    plans=("relative", "joined", "semicolon"),
    contrast=", although it ",
)

BOAT = Domain(
    key="boat",
    names=names(
        "{} {}",
        first="Bold Brave Gentle Lady Lucky Merry Northern Patient Restless Silent Southern Swift",
        second="Cormorant Curlew Dipper Marten Petrel Tern",
        unseen="Faithful Morning Proud",
    ),
    types=("sloop", "ketch", "cutter", "narrowboat", "motor cruiser", "catamaran"),
    slots={
        "length": each("8 m, 9.2 m, 10.5 m, 11 m, 12.8 m, 14 m", pre("{v}"), verb("measures {v}")),
        "hull": each(
            "steel, oak, fibreglass, aluminium, cedar", pre("{v}-hulled"), have("{a} hull")
        ),
        "built": each(
            "1934, 1957, 1968, 1979, 1988, 2003, 2015",
            post("built in {v}"),
            verb("was built in {v}"),
        ),
        "berths": each("2, 3, 4, 5, 6, 8", have("{n} berths"), verb("sleeps {n}")),
        "price": each(
            "£8,500, £14,000, £24,000, £37,500, £62,000",
            verb("is for sale at {v}"),
            verb("is priced at {v}"),
        ),
        "engine": {
            **each("diesel, electric, petrol", have("{a} engine"), verb("has {a} engine")),
            "none": (neg("has no engine"),),
        },
    },
    plans=("relative", "apposition"),
    contrast=" but ",
)

APP = Domain(
    key="app",
    names=names(
        "{}{}",
        first="Bright Clear Daily Easy Kind Leaf Little Open Pocket Smart Steady True",
        second="dock list mark nest path wise",
        unseen="Calm Fern Swift",
    ),
    types=(
        "note-taking app",
        "weather app",
        "budgeting app",
        "recipe app",
        "running app",
        "translation app",
    ),
    slots={
        "price": {
            "free": (pre("free"), verb("costs nothing")),
            **each("£2 a month, £5 a month, £12 a year, £20 a year, £40 a year", verb("costs {v}")),
        },
        "platform": each(
            "Android, iOS, Linux, Windows, macOS", post("for {v}"), verb("runs on {v}")
        ),
        "storage": each(
            "18 MB, 42 MB, 85 MB, 110 MB, 240 MB",
            verb("takes up {v}"),
            verb("needs {v} of storage"),
        ),
        "languages": each(
            "3, 7, 12, 20, 31",
            verb("is available in {n} languages"),
            verb("supports {n} languages"),
        ),
        "offline": {
            "yes": (verb("works offline"), verb("can be used offline")),
            "no": (neg("does not work offline"), neg("cannot be used offline")),
        },
        "adverts": {
            "yes": (neg("shows adverts"), neg("carries adverts")),
            "no": (verb("shows no adverts"), verb("carries no adverts")),
        },
    },
    plans=("apposition", "semicolon", "relative"),
    contrast=" but ",
)

THINGS = (TOOL, FILM, INSTRUMENT, BOAT, APP)
