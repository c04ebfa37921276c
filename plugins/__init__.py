"""The methods: what to train on next. One paper a file."""

from samplewise.plugins.infobatch import InfoBatch as InfoBatch
from samplewise.plugins.rs2 import RS2 as RS2
from samplewise.plugins.seta import SeTa as SeTa
from samplewise.plugins.uniform import Uniform as Uniform
