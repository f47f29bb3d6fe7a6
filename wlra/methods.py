"""The registry: a method is one line here, and inherits the driver and every test of the contract."""

from wlra.accelerate import accelerated, anderson, nesterov, plain
from wlra.driver import Method
from wlra.published import published
from wlra.sweeps import als, em

stay = Method(lambda problem, factors: (factors, ()), lambda problem, factors, aux: (factors, aux))

METHODS: dict[str, Method] = {
    "em": accelerated(em, plain),
    "nesterov": accelerated(em, nesterov),
    "anderson": accelerated(em, anderson),
    "als": accelerated(als, plain),
}

PUBLISHED: dict[str, Method] = {
    "em": published(plain),
    "nesterov": published(nesterov),
    "anderson": published(anderson),
}
