"""Adam on the salient weights: what a step is asked to do, who carries it out, what is kept between steps."""
