"""The methods: what to train on next. One paper a file."""

from samplewise.plugins.adore import AdoreLoss as AdoreLoss
from samplewise.plugins.bit_adapters import add_adapters as add_adapters
from samplewise.plugins.bit_adapters import merged as merged
from samplewise.plugins.bit_adapters import set_bits as set_bits
from samplewise.plugins.bit_schedule import ArmSchedule as ArmSchedule
from samplewise.plugins.bit_schedule import BitSchedule as BitSchedule
from samplewise.plugins.correction import CorrectionDataset as CorrectionDataset
from samplewise.plugins.correction import correction_connector as correction_connector
from samplewise.plugins.hard_negatives import mine_hard_negatives as mine_hard_negatives
from samplewise.plugins.infobatch import InfoBatch as InfoBatch
from samplewise.plugins.multi_bit import quantize_model as quantize_model
from samplewise.plugins.rs2 import RS2 as RS2
from samplewise.plugins.self_tokens import BetaSchedule as BetaSchedule
from samplewise.plugins.self_tokens import SelfTokenMixer as SelfTokenMixer
from samplewise.plugins.seta import SeTa as SeTa
from samplewise.plugins.star import star_loss as star_loss
from samplewise.plugins.token_buffer import TokenBuffer as TokenBuffer
from samplewise.plugins.token_refresh import refresh_attempts as refresh_attempts
from samplewise.plugins.token_refresh import refresh_self_tokens as refresh_self_tokens
from samplewise.plugins.trajectories import TrajectorySampler as TrajectorySampler
from samplewise.plugins.uniform import Uniform as Uniform
