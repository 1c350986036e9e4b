"""The 21 domains of prompts that evaluations by people use by default."""

from dit_video.curation.raters.prompt_domains import PromptDomain, PromptDomains

DEFAULT_PROMPT_DOMAINS = PromptDomains(
    domains=(
        PromptDomain(
            name="people",
            templates=("{subject} laughs {scene}", "a close-up of {subject} who looks into the camera {scene}"),
            subjects=("an elderly fisherman", "a young woman with curly hair", "a bearded man", "a girl in a red coat"),
            scenes=("on a rainy street", "in warm evening light", "by a window"),
        ),
        PromptDomain(
            name="groups of people",
            templates=("{subject} {scene}", "a slow pan over {subject} {scene}"),
            subjects=("three friends who talk", "a family at breakfast", "a choir in white robes", "two chess players"),
            scenes=("in a garden", "in a large hall with high windows", "under a canopy at night"),
        ),
        PromptDomain(
            name="hands and gestures",
            templates=("close-up of hands that {subject}, {scene}", "two hands {subject}, seen from above, {scene}"),
            subjects=("tie a knot", "fold a paper crane", "knead dough", "shuffle a deck of cards"),
            scenes=("on a wooden table", "with a dark background", "in daylight"),
        ),
        PromptDomain(
            name="pets",
            templates=("{subject} chases a ball {scene}", "{subject} yawns and stretches {scene}"),
            subjects=("a corgi puppy", "a grey tabby cat", "a white rabbit", "a golden retriever"),
            scenes=("in a living room", "on fresh grass", "on a staircase"),
        ),
        PromptDomain(
            name="wild animals",
            templates=("{subject} walks {scene}", "{subject} turns its head and listens {scene}"),
            subjects=("a red fox", "a herd of elephants", "a snow leopard", "a brown bear"),
            scenes=("through deep snow", "across a dry plain", "along a river bank"),
        ),
        PromptDomain(
            name="birds and insects",
            templates=("{subject} takes off {scene}", "slow motion of {subject} in flight {scene}"),
            subjects=("a hummingbird", "a flock of starlings", "a monarch butterfly", "a honeybee"),
            scenes=("before a meadow", "against a blue sky", "at dawn"),
        ),
        PromptDomain(
            name="underwater",
            templates=("{subject} glides {scene}", "a diver follows {subject} {scene}"),
            subjects=("a sea turtle", "a school of silver fish", "a manta ray", "a glowing jellyfish"),
            scenes=("over a coral reef", "through shafts of sunlight", "in dark blue water"),
        ),
        PromptDomain(
            name="landscapes",
            templates=("an aerial view of {subject} {scene}", "the camera flies forward over {subject} {scene}"),
            subjects=("rolling green hills", "a desert with high dunes", "a fjord", "a snowy mountain ridge"),
            scenes=("at sunrise", "under heavy clouds", "in autumn"),
        ),
        PromptDomain(
            name="weather and sky",
            templates=("{subject} over {scene}", "time lapse of {subject} over {scene}"),
            subjects=("a thunderstorm with lightning", "drifting fog", "northern lights", "racing clouds"),
            scenes=("a lake", "a small village", "open fields"),
        ),
        PromptDomain(
            name="water and fire",
            templates=("{subject} {scene}", "{subject} {scene}, in slow motion"),
            subjects=("waves break", "sparks rise from a campfire", "a candle flame flickers", "water drops splash"),
            scenes=("in the dark", "before black rocks", "with a shallow depth of field"),
        ),
        PromptDomain(
            name="plants",
            templates=("{subject} sways in the wind {scene}", "time lapse of {subject} that opens {scene}"),
            subjects=("a red poppy", "a sunflower", "a cherry blossom branch", "a water lily"),
            scenes=("in morning dew", "before a blurred forest", "in the rain"),
        ),
        PromptDomain(
            name="city life",
            templates=("{subject} {scene}", "a drone shot of {subject} {scene}"),
            subjects=("a busy crossing", "a market street", "a tram that passes old houses", "a harbour promenade"),
            scenes=("at night with neon signs", "at noon", "after rain"),
        ),
        PromptDomain(
            name="architecture and interiors",
            templates=("the camera moves slowly through {subject} {scene}", "{subject} {scene}, wide shot"),
            subjects=("a gothic cathedral", "a modern glass house", "an old library", "a spiral staircase"),
            scenes=("with dust in beams of light", "at dusk", "without people"),
        ),
        PromptDomain(
            name="vehicles",
            templates=("{subject} drives {scene}", "a tracking shot of {subject} that speeds {scene}"),
            subjects=("a red vintage car", "a motorcycle", "a yellow school bus", "a white camper van"),
            scenes=("along a coastal road", "through a tunnel", "across a bridge"),
        ),
        PromptDomain(
            name="aircraft, ships and trains",
            templates=("{subject} passes {scene}", "{subject} comes nearer {scene}"),
            subjects=("a steam locomotive", "a sailing ship", "a hot-air balloon", "a propeller aircraft"),
            scenes=("in front of mountains", "in golden light", "through mist"),
        ),
        PromptDomain(
            name="sport",
            templates=("{subject} {scene}", "slow motion of {subject} {scene}"),
            subjects=(
                "a gymnast who does a backflip",
                "a surfer on a large wave",
                "a skier who jumps",
                "a sprinter who starts",
            ),
            scenes=("before a cheering crowd", "in bright sunshine", "seen from the side"),
        ),
        PromptDomain(
            name="dance and music",
            templates=("{subject} performs {scene}", "the camera circles {subject} {scene}"),
            subjects=("a ballet dancer", "a violinist", "a jazz drummer", "a flamenco dancer"),
            scenes=("on a dark stage under a spotlight", "on a roof at sunset", "in an empty theatre"),
        ),
        PromptDomain(
            name="food and cooking",
            templates=("{subject} {scene}", "macro shot: {subject} {scene}"),
            subjects=(
                "honey drips on pancakes",
                "a cook flips vegetables in a pan",
                "coffee is poured",
                "steam rises from soup",
            ),
            scenes=("in a rustic kitchen", "on a marble counter", "in soft side light"),
        ),
        PromptDomain(
            name="objects and physics",
            templates=("{subject} {scene}", "high-speed camera: {subject} {scene}"),
            subjects=(
                "a glass falls and breaks",
                "dominoes topple",
                "a spinning top slows down",
                "a ball bounces down stairs",
            ),
            scenes=("on a tiled floor", "in front of a white wall", "in a workshop"),
        ),
        PromptDomain(
            name="science fiction and fantasy",
            templates=("{subject} {scene}", "cinematic shot of {subject} {scene}"),
            subjects=(
                "an astronaut who walks",
                "a dragon that spreads its wings",
                "a robot gardener",
                "a floating island",
            ),
            scenes=("on a red planet", "above a sea of clouds", "under two moons"),
        ),
        PromptDomain(
            name="styles and animation",
            templates=("{scene} of {subject}", "{scene} of {subject}, with gentle camera motion"),
            subjects=(
                "a lighthouse in a storm",
                "a cat that plays the piano",
                "a train through a valley",
                "a dancing bear",
            ),
            scenes=("watercolour animation", "stop-motion clay animation", "black-and-white film", "pixel art"),
        ),
    )
)
"""Domains about what people film and imagine; each has 24 prompts or more."""
