"""What the synthetic receipts are made of: products, invented brands, shops. All made up for this project.

CATEGORIES: category -> Aisle. A brand belongs to one category, a product to one category, so both can be learnt.
"""

from dataclasses import dataclass

LITERS = ("0.25 l", "0.33 l", "0.5 l", "0.75 l", "1 l", "1.5 l", "2 l", "330 ml", "500 ml", "750 ml")
GRAMS = ("50 g", "100 g", "150 g", "200 g", "250 g", "400 g", "500 g", "750 g", "1 kg", "2 kg")
PIECES = ("2 pcs", "3 pcs", "4 pcs", "6 pcs", "8 pcs", "10 pcs", "12 pcs", "20 pcs", "24 pcs", "50 pcs")


@dataclass(frozen=True)
class Aisle:
    products: tuple[str, ...]
    attributes: tuple[str, ...]
    brands: tuple[str, ...]
    sizes: tuple[str, ...]


def _aisle(products: str, attributes: str, brands: str, sizes: tuple[str, ...]) -> Aisle:
    def items(text: str) -> tuple[str, ...]:
        return tuple(item.strip() for item in text.split(","))

    return Aisle(items(products), items(attributes), items(brands), sizes)


CATEGORIES = {
    "Beverages": _aisle(
        "orange juice, apple juice, tomato juice, mineral water, lemonade, iced tea, energy drink, cola, ginger ale, "
        "tonic water, coconut water, fruit syrup",
        "sparkling, still, unsweetened, chilled, multivitamin",
        "Sunvale, Orchard Lane, Bluespring, Fizzo, Karuma, Lumo, Northwell",
        LITERS,
    ),
    "Alcohol": _aisle(
        "red wine, white wine, lager beer, dark beer, wheat beer, apple cider, vodka, whisky, brandy, gin, dark rum",
        "dry, sweet, filtered, aged, alcohol-free",
        "Castellano, Old Harbor, Grauberg, Vinaria, Ravenhill, Stonebrew",
        LITERS,
    ),
    "Dairy": _aisle(
        "milk, kefir, sour cream, natural yogurt, cottage cheese, cream cheese, butter, hard cheese, mozzarella, "
        "condensed milk, whipping cream, milk dessert",
        "pasteurized, low-fat, organic, lactose-free, farm",
        "Meadowbrook, Alpengold Farm, Milkana Hill, Clover Dale, Whitecap, Bella Latte, Danvia",
        GRAMS,
    ),
    "Bread and bakery": _aisle(
        "white bread, rye bread, baguette, croissant, burger buns, pita bread, bagel, fruit cake, cinnamon roll, "
        "toast bread, crispbread, apple pie",
        "sliced, wholegrain, fresh, frozen, gluten-free",
        "Baker Street, Golden Crust, Hearthside, Millstone, Panella, Grandma Rosa",
        GRAMS,
    ),
    "Meat": _aisle(
        "chicken breast, chicken wings, turkey fillet, beef mince, pork chops, lamb shoulder, smoked ham, "
        "salami, frankfurters, liver pate, bacon",
        "chilled, frozen, boneless, smoked, marinated",
        "Ridgefield, Butchers Pride, Valdemar, Prime Acre, Tavola, Countryman",
        GRAMS,
    ),
    "Fish and seafood": _aisle(
        "salmon fillet, herring, canned tuna, cod fillet, shrimp, squid rings, mussels, crab sticks, trout, sardines, "
        "fish fingers",
        "frozen, salted, smoked, peeled, chilled",
        "Seawind, Nordfjord, Captain Bay, Oceanika, Blue Anchor",
        GRAMS,
    ),
    "Fruit and vegetables": _aisle(
        "bananas, green apples, oranges, lemons, grapes, tomatoes, cucumbers, potatoes, carrots, onions, cabbage, "
        "bell pepper, mushrooms, spinach",
        "fresh, washed, imported, organic, selected",
        "Greenfield, Harvest Moon, Vita Garden, Sunny Patch, Fresca",
        GRAMS,
    ),
    "Grocery": _aisle(
        "spaghetti, long rice, buckwheat, oat flakes, wheat flour, sugar, sea salt, sunflower oil, olive oil, "
        "red lentils, corn flakes, breadcrumbs",
        "premium, refined, coarse, organic, instant",
        "Pastoria, Granum, Goldensack, Terra Nostra, Makfa House, Oliveto, Daily Choice",
        GRAMS,
    ),
    "Sauces and spices": _aisle(
        "tomato ketchup, mayonnaise, mustard, soy sauce, black pepper, ground paprika, wine vinegar, tomato paste, "
        "garlic sauce, horseradish, curry powder",
        "hot, mild, classic, ground, light",
        "Saucier, Pikanta, Red Chef, Spice Road, Aroma Trail, Hotley",
        GRAMS,
    ),
    "Sweets and snacks": _aisle(
        "milk chocolate, dark chocolate, chocolate bar, potato chips, salted peanuts, caramel candy, marshmallow, "
        "wafers, oat cookies, popcorn, chewing gum, fruit jelly",
        "crunchy, glazed, salted, assorted, sugar-free",
        "Chocolino, Crispy Joe, Sweetwell, Nutty Bear, Karamella, Wafelini, Popsy, Bon Amie",
        GRAMS,
    ),
    "Tea and coffee": _aisle(
        "black tea, green tea, herbal tea, ground coffee, coffee beans, instant coffee, cocoa powder, coffee capsules, "
        "fruit tea, chicory drink",
        "roasted, loose, strong, flavored, decaffeinated",
        "Ceylonia, Tea Harbor, Monte Bruno, Cafe Ruvio, Earl William, Arabella",
        GRAMS,
    ),
    "Household": _aisle(
        "dish soap, laundry powder, toilet paper, paper towels, garbage bags, glass cleaner, kitchen sponge, "
        "fabric softener, bleach, aluminium foil, rubber gloves, floor cleaner",
        "concentrated, scented, universal, antibacterial, soft",
        "Cleanova, Sparklex, Softina, Domestix, Purewave, Homely, Brillo King",
        PIECES,
    ),
    "Personal care": _aisle(
        "shampoo, shower gel, toothpaste, toothbrush, hand cream, deodorant, shaving foam, liquid soap, cotton pads, "
        "hair conditioner, wet wipes, lip balm",
        "moisturizing, gentle, herbal, refreshing, nourishing",
        "Dermalia, Freshwell, Silkora, Denta Plus, Aquabelle, Menton, Rosalind",
        PIECES,
    ),
    "Pet supplies": _aisle(
        "dry cat food, wet cat food, dry dog food, dog treats, cat litter, bird seed, fish flakes, "
        "chew bone, pet shampoo",
        "adult, junior, grain-free, sterilized, tasty",
        "Purrfect, Barkley, Felina, Wuffy, Petropolis, Miavit",
        PIECES,
    ),
    "Electronics": _aisle(
        "alkaline battery, light bulb, phone charger, extension cord, usb cable, headphones, flash drive, flashlight, "
        "wall adapter, night lamp",
        "rechargeable, wireless, universal, compact, fast",
        "Voltix, Lumenar, Elektra, Powerline, Sonique, Duramax",
        PIECES,
    ),
}

UNITS = {"l": "liters", "ml": "milliliters", "g": "grams", "kg": "kilograms", "pcs": "pieces"}

COMPANY_FIRST = (
    "SUNRISE", "GOLDEN LEAF", "RIVERSIDE", "HAPPY HOME", "NORTH STAR", "GREEN VALLEY", "BLUE OCEAN", "CITY LIGHT",
    "MAPLE TREE", "RED LANTERN", "SILVER MOON", "OLD MILL", "FOUR SEASONS", "GRAND PALM", "WHITE ROSE", "LUCKY STAR",
)  # fmt: skip
COMPANY_SECOND = (
    "MART", "TRADING", "HARDWARE", "BAKERY", "PHARMACY", "RESTAURANT", "BOOKSTORE", "FOODS", "CAFE", "SUPERMARKET",
)  # fmt: skip
COMPANY_END = ("SDN BHD", "LTD", "ENTERPRISE", "INC", "& CO")
STREETS = (
    "MAPLE STREET", "STATION ROAD", "HARBOUR LANE", "PARK AVENUE", "MARKET SQUARE", "CHURCH STREET", "MILL ROAD",
    "KING STREET", "LAKE VIEW ROAD", "ORCHARD LANE", "HILL STREET", "GARDEN ROAD", "BRIDGE STREET", "FOREST AVENUE",
)  # fmt: skip
TOWNS = (
    "RIVERTON", "ASHFORD", "KINGSBURY", "LAKEWOOD", "MILLFIELD", "NEWHAVEN", "OAKDALE", "PORT LINDEN", "STONEBRIDGE",
    "WESTBROOK",
)  # fmt: skip
