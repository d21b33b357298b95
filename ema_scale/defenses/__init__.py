"""Defenses: each acts at one or more of six points of a training run (see `base`). Importing them loads no torch."""

from ema_scale.defenses.ablation import Ablation
from ema_scale.defenses.activation_capping import ActivationCapping
from ema_scale.defenses.antibody import Antibody
from ema_scale.defenses.asft import AsFT
from ema_scale.defenses.base import Defense, FinishContext, PenaltyInputs, RowsContext
from ema_scale.defenses.ceiling import Ceiling
from ema_scale.defenses.dft import DFT
from ema_scale.defenses.early_stopping import EarlyStopping
from ema_scale.defenses.gradient_routing import GradientRouting
from ema_scale.defenses.inoculation import Inoculation
from ema_scale.defenses.inoculation_adapter import InoculationAdapter
from ema_scale.defenses.interleaving import Interleaving
from ema_scale.defenses.interleaving_plus import InterleavingPlus
from ema_scale.defenses.kl import KL
from ema_scale.defenses.latent_blocking import LatentBlocking
from ema_scale.defenses.ldifs import LDIFS
from ema_scale.defenses.registry import catalogue, parse
from ema_scale.defenses.safegrad import SafeGrad
from ema_scale.defenses.safelora import SafeLoRA
from ema_scale.defenses.star_dss import StarDSS
from ema_scale.defenses.steering import Steering
from ema_scale.defenses.terms import Divergence, LabelLogProbs, LabelTerm, LabelWeight, TokenSet
from ema_scale.defenses.trait_monitor import TraitMonitor
from ema_scale.defenses.treft import TReFT
from ema_scale.models.side_adapters import SideAdapter

__all__ = [
    "DFT",
    "KL",
    "LDIFS",
    "Ablation",
    "Antibody",
    "AsFT",
    "TReFT",
    "ActivationCapping",
    "Ceiling",
    "Defense",
    "Divergence",
    "EarlyStopping",
    "FinishContext",
    "GradientRouting",
    "Inoculation",
    "InoculationAdapter",
    "Interleaving",
    "InterleavingPlus",
    "LabelLogProbs",
    "LabelTerm",
    "LabelWeight",
    "LatentBlocking",
    "PenaltyInputs",
    "RowsContext",
    "SafeGrad",
    "SafeLoRA",
    "SideAdapter",
    "StarDSS",
    "Steering",
    "TokenSet",
    "TraitMonitor",
    "catalogue",
    "parse",
]
