"""Domain tables: places to stay, trails, cafés, gardens and museums."""

from __future__ import annotations

from descriptions.phrases import Domain, each, have, names, neg, post, pre, verb

LODGING = Domain(
    key="lodging",
    names=names(
        "{} {}",
        first="Alder Bracken Corran Dunmore Elder Fallow Gorse Hazel Kestrel Larch Marlow Otter",
        second="Arms Court Corner Hall Place Rest",
        unseen="Juniper Osprey Tamsin",
    ),
    types=("guest house", "inn", "hostel", "hotel", "aparthotel"),
    slots={
        "style": each("family-run, modern, old-fashioned, lively, secluded", pre("{v}")),
        "location": {
            **each("old harbour, cathedral quarter", post("in the {v}")),
            **each("market square, high street", post("on the {v}")),
            **each("railway station, bus station", post("next to the {v}")),
        },
        "rooms": each("4, 6, 8, 9, 12, 15, 24, 40", have("{n} rooms"), verb("has {n} rooms")),
        "price": each(
            "£35 a night, £48 a night, £60 a night, £72 a night, £85 a night, £110 a night",
            verb("costs {v}"),
            verb("charges {v}"),
        ),
        "breakfast": {
            "included": (
                verb("includes breakfast in the price"),
                verb("serves breakfast at no extra cost"),
            ),
            **each("£7 extra, £9 extra, £12 extra", verb("offers breakfast for {v}")),
            "no": (neg("does not serve breakfast"),),
        },
        "dogs": {
            "yes": (verb("welcomes dogs"), verb("is happy to take dogs")),
            "no": (neg("does not take dogs"), neg("has no room for dogs")),
        },
    },
    plans=("apposition", "joined"),
    contrast=" but ",
)

TRAIL = Domain(
    key="trail",
    names=names(
        "{} {}",
        first="Arrow Birk Cairn Drover's Eagle Fox Granite Heron Miller's Pilgrim's Raven "
        "Shepherd's",
        second="Edge Loop Round Trail Traverse Way",
        unseen="Badger Lantern Smuggler's",
    ),
    types=("footpath", "bridleway", "ridge walk", "woodland walk", "coastal path", "cycle route"),
    slots={
        "grade": each("easy, moderate, hard", pre("{v}"), verb("is graded {v}")),
        "distance": each(
            "4 km, 5.5 km, 7 km, 8 km, 9.5 km, 11 km, 13 km",
            pre("{v}"),
            verb("covers {v}"),
        ),
        "start": each(
            "Corry Bridge, Hale station, Linden Mill, Ostrey, the quarry gate, the ferry pier",
            post("from {v}"),
            verb("starts at {v}"),
        ),
        "surface": each(
            "gravel, grass, tarmac, bare rock, sand",
            verb("keeps to {v} throughout"),
            verb("is {v} all the way"),
        ),
        "time": each(
            "90 minutes, 2 hours, 3 hours, 4 hours, half a day, a full day",
            verb("takes {v}"),
            verb("can be done in {v}"),
        ),
        "pushchairs": {
            "yes": (verb("is suitable for pushchairs"), verb("can be managed with a pushchair")),
            "no": (
                neg("is not suitable for pushchairs"),
                neg("cannot be managed with a pushchair"),
            ),
        },
    },
    plans=("semicolon", "relative", "joined"),
    contrast=" but ",
)

CAFE = Domain(
    key="café",
    names=names(
        "The {} {}",
        first="Amber Blue Copper Crooked Green Hungry Little Old Painted Paper Silver Wandering",
        second="Bean Kettle Ladle Magpie Spoon Teapot",
        unseen="Brass Idle Velvet",
    ),
    types=("café", "tea room", "coffee bar", "bakery", "juice bar", "ice-cream parlour"),
    slots={
        "location": {
            **each("Quay Street, Mercer Lane, Abbey Road", post("on {v}")),
            **each("canal, river", post("by the {v}")),
            **each("covered market, old arcade", post("in the {v}")),
            **each("town library", post("opposite the {v}")),
        },
        "seats": each(
            "8, 12, 18, 22, 30, 45", pre("{n}-seat"), have("{n} seats"), verb("seats {n} people")
        ),
        "speciality": each(
            "cardamom buns, lemon tart, sourdough toast, carrot cake, cheese scones, plum cake, "
            "almond croissants, pistachio ice cream",
            verb("specialises in {v}"),
            verb("is known for its {v}"),
        ),
        "hours": each(
            "7 am to 3 pm, 8 am to 4 pm, 8 am to 6 pm, 9 am to 5 pm, 10 am to 10 pm",
            verb("is open from {v}"),
        ),
        "rating": each(
            "3.8 out of 5, 4.1 out of 5, 4.4 out of 5, 4.6 out of 5, 4.9 out of 5",
            verb("is rated {v}"),
            verb("scores {v}"),
        ),
        "Wi-Fi": {
            "free": (have("free Wi-Fi"), verb("offers free Wi-Fi")),
            "no": (neg("has no Wi-Fi"), neg("does not offer Wi-Fi")),
        },
    },
    plans=("joined", "apposition", "relative"),
    contrast=", although it ",
)

GARDEN = Domain(
    key="garden",
    names=names(
        "{} {}",
        first="Ashby Belmont Carrick Denholm Esk Farrow Glebe Holm Ingram Kelling Lorne Merton",
        second="Abbey Grange House Manor Park Priory",
        unseen="Quarley Thorne Wyverne",
    ),
    types=("walled garden", "rose garden", "water garden", "arboretum", "rock garden"),
    slots={
        "acres": each("2, 3, 5, 8, 11, 20", pre("{n}-acre"), verb("covers {n} acres")),
        "nearest town": each(
            "Penlow, Stour Bridge, Aldermere, Westhaven, Tilbrook", post("near {v}")
        ),
        "highlight": each(
            "yew maze, orchid house, lily pond, herb terrace, old fig tree, avenue of limes",
            have("{a}"),
            verb("is home to {a}"),
        ),
        "best season": each(
            "early spring, late spring, midsummer, autumn, winter",
            verb("is at its best in {v}"),
            verb("looks its best in {v}"),
        ),
        "entry": {
            "free": (verb("is free to enter"), verb("lets visitors in free of charge")),
            **each(
                "£3, £5, £6.50, £8, £10", verb("charges {v} for entry"), verb("costs {v} to enter")
            ),
        },
        "wheelchair access": {
            "yes": (verb("is accessible by wheelchair"), verb("has wheelchair access")),
            "no": (neg("is not accessible by wheelchair"), neg("has no wheelchair access")),
        },
    },
    plans=("apposition", "semicolon"),
    contrast=", although it ",
)
MUSEUM = Domain(
    key="museum",
    names=names(
        "The {} {}",
        first="Arkwright Bellamy Calder Dunning Everard Fenwick Garrow Harbin Kirkby Lovell Moray "
        "Norwood",
        second="Centre Collection Foundation House Institute Trust",
        unseen="Pellew Saltmarsh Vickery",
    ),
    types=(
        "maritime museum",
        "toy museum",
        "clock museum",
        "textile museum",
        "railway museum",
        "art museum",
    ),
    slots={
        "building": each(
            "former mill, old customs house, Victorian school, disused chapel, brick warehouse",
            post("in {a}"),
            verb("is housed in {a}"),
        ),
        "founded": each(
            "1894, 1911, 1923, 1938, 1956, 1977, 2004",
            verb("dates from {v}"),
            verb("has been open since {v}"),
        ),
        "exhibits": each(
            "120, 450, 900, 1,500, 3,000, 8,000", have("{v} exhibits"), verb("shows {v} exhibits")
        ),
        "ticket": {
            "free": (verb("is free to visit"), verb("admits visitors free of charge")),
            **each(
                "£4, £6, £7.50, £9, £12", verb("charges {v} a ticket"), verb("costs {v} to visit")
            ),
        },
        "guided tours": {
            "daily": (verb("runs guided tours daily"),),
            "at weekends": (verb("runs guided tours at weekends"),),
            "none": (neg("runs no guided tours"), neg("does not offer guided tours")),
        },
        "closed": each(
            "Mondays, Tuesdays, Wednesdays, Sundays", neg("is closed on {v}"), neg("closes on {v}")
        ),
    },
    plans=("semicolon", "apposition", "joined"),
    contrast=" but ",
)

PLACES = (LODGING, TRAIL, CAFE, GARDEN, MUSEUM)
