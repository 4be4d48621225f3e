"""Every key of a run, with its meaning. The other configs override a few of these; nothing below sets a default.

Not a run by itself: start from quickstart.py, small.py or emoji.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys and their usual values."""
    c = ConfigDict()

    # ---- how long, how much
    c.seed = 0  # of all randomness: parameters, noise, times, caption dropout, data order
    # whose parameters a new run begins with: a run, an export, or FILE.safetensors of a DiT; "": random ones
    c.init_from = ""
    c.total_steps = 100_000  # length of the run and of the learning-rate schedule; 0: use total_epochs
    c.total_epochs = 0  # only read when total_steps is 0
    c.stop_at_step = 0  # save and stop after this step although the run is longer; 0 is off
    c.max_hours = 0.0  # save and end with exit code 75 after so many hours, before a scheduler's limit; 0 is off
    c.batch_size = 128  # pictures a step, over all devices
    # slices of the batch whose gradients are added up: less memory, same loss but for the draws of dropout
    c.accumulate = 1

    # ---- optimizer
    c.optimizer = "adamw"  # adamw | muon: fewer pictures to the same loss, more work a step
    c.learning_rate = 1e-4  # peak
    c.learning_rate_schedule = "cosine"  # cosine | constant, after the warm-up
    c.warmup_steps = 500  # from 0 to the peak; cut to total_steps // 10 when it would be the whole run
    c.adam_b1 = 0.9  # muon: of what stays with AdamW; the blocks' kernels have muon_momentum
    c.adam_b2 = 0.999
    c.muon_momentum = 0.95
    c.moment_dtype = "float32"  # that first moments and momentum are kept in: float32 | bfloat16, half of their memory
    c.weight_decay = 0.01  # of kernels only
    c.clip_norm = 1.0  # global norm of the gradient
    c.ema_decay = 0.9999  # of the averaged parameters that samples are drawn with

    # ---- numbers
    # compute: auto | float32 | bfloat16 | float16 (with dynamic loss scaling). auto: float32 on CPU, bfloat16 on TPU
    # and GPU, float16 on a GPU older than Ampere (T4, V100)
    c.dtype = "auto"
    c.deterministic = False  # on a GPU: the same bits every time, and slower; on CPU and TPU they are the same anyway

    # ---- devices: those that are left over hold different pictures and the same parameters
    c.mesh = ConfigDict()
    c.mesh.fsdp = 1  # so many have a share each of parameters, optimizer and average; 0: as many as there are
    c.mesh.tensor = 1  # so many of one machine compute the same pictures, each with some of the heads

    # ---- what ends a run
    # a step whose loss or gradient is not finite is skipped; so many in a row end the run, with exit code 4
    c.max_skipped_in_a_row = 10
    # a step that takes longer than so many seconds, and than 20 usual ones, ends the run with exit code 9; 0 is off
    c.stall_patience = 600.0

    # ---- what is written, in steps; 0 is off
    c.log_every = 100
    c.save_every = 5_000
    c.sample_every = 5_000
    c.validate_every = 0  # the error on records that data.validation_fraction sets aside
    c.keep_latest = 2  # newest checkpoints kept
    c.keep_every = 0  # checkpoints at multiples of this are kept for good
    c.keep_best = 0  # checkpoints kept that have the lowest validation error; needs validate_every
    c.verify_checkpoints = "full"  # before they are used: full, by sha256 | fast: are all files there, and uncut?
    c.wandb_project = ""  # Weights & Biases project (extra: wandb); "" is off

    # ---- frozen encoders: embedded, a folder in the published layout, or a hub id owner/name[/subfolder][@revision]
    c.vae = "embedded"
    c.text_encoder = "embedded"
    c.preview_vae = ""  # decodes the samples of a run in place of vae: a TAESD is much faster; "": vae itself
    c.latents = ConfigDict()
    c.latents.normalize = "vae"  # vae: the VAE's own scale and shift | measured: per channel, on 2,048 records
    c.latents.shift = ()  # one number per channel, found at start; model latents = (raw - shift) * scale
    c.latents.scale = ()

    # ---- data
    c.data = ConfigDict()
    # shapes, or KIND:PLACE[?option=value&...] with folder | jsonl | csv | parquet | coco | wds | tfds | hf | cache; or
    # several by weight, as in "0.7*folder:cats + 0.3*hf:owner/name?split=train"
    c.data.source = "shapes"
    c.data.image_size = 256  # pictures are resized and cropped to this square
    c.data.crop = "center"  # center | random
    c.data.flip = "auto"  # mirror half of the pictures: on | off | auto (off where captions speak of left and right)
    c.data.num_pictures = 20_000  # shapes only: how many different pictures are drawn
    c.data.max_objects = 2  # shapes only: 1, 2 or 3 objects a picture
    c.data.encode = "once"  # once: before the run, and kept in its workdir | every_step: for sets that do not fit
    c.data.storage_dtype = "float16"  # what latents are kept in, in memory and in a cache: float16 | float32
    # 0: squares. N: at most N shapes of about image_size**2 pixels, a batch has one of them, nothing is squared
    c.data.buckets = 0
    c.data.validation_fraction = 0.0  # set aside by a hash of their id: never trained on; validate_every scores them
    c.data.validation_records = 512  # at most so many of them are scored: those with the smallest hashes
    c.data.max_bad_fraction = 0.01  # more unreadable records than this stop the run
    c.data.workers = 0  # processes that read and decode; 0: threads of this one. From a cache: threads that gather
    c.data.patience = 600.0  # seconds without a batch after which the run ends, saying so; 0 waits for ever

    # ---- diffusion
    c.diffusion = ConfigDict()
    c.diffusion.schedule = "scaled_linear"  # linear | scaled_linear | cosine | edm | rectified_flow
    c.diffusion.shift = 1.0  # resolution shift s of rectified_flow
    c.diffusion.prediction = "epsilon"  # epsilon | v | x0 | flow
    c.diffusion.times = "uniform"  # uniform | stratified | logit_normal | log_normal (usual for edm)
    c.diffusion.logit_mean = 0.0  # logit_normal only
    c.diffusion.logit_std = 1.0
    c.diffusion.noise_mean = -1.2  # log_normal only: of ln(sigma / alpha)
    c.diffusion.noise_std = 1.2
    c.diffusion.weighting = "uniform"  # of the loss over times: uniform | min_snr | sigmoid
    c.diffusion.min_snr_gamma = 5.0  # min_snr only
    c.diffusion.sigmoid_bias = 0.0  # sigmoid only: larger counts times with less noise too
    c.diffusion.variance_weight = 0.001  # of the loss of a learned variance: only read where the model has one
    c.caption_dropout = 0.1  # captions replaced by the learned null caption, for guidance

    # ---- the model: the fields of dit_jax.models.dit.DiT
    c.model = ConfigDict()
    c.model.hidden_size = 384
    c.model.num_layers = 8
    c.model.num_heads = 6
    c.model.attention_head_dim = 64
    c.model.patch_size = 2
    c.model.in_channels = 4
    c.model.out_channels = 4  # in_channels, or twice that: with a learned variance, which sampler ddpm draws with
    c.model.mlp_ratio = 4.0
    c.model.mlp = "silu"  # silu | gelu | swiglu (two thirds as wide, with one matrix more)
    c.model.norm = "layer"  # layer | rms
    c.model.qk_norm = False  # normalise queries and keys: scores of attention stay small
    c.model.positions = "learned"  # of patches, added to them: learned | sincos | none (with rope)
    c.model.rope = False  # rotary positions, of queries and keys
    c.model.base_grid = 0  # patches along a side that sincos and rope are made for; 0: those of data.image_size
    c.model.num_registers = 0  # learned tokens beside the patches
    c.model.dropout = 0.1
    # pooled: one vector per caption | cross: blocks attend to its tokens too | joint: tokens go through the blocks
    c.model.text_mode = "pooled"
    c.model.text_pool = "eos"  # where that vector comes from: eos | mean | none (with cross or joint)
    c.model.modulation = "adaln"  # adaln | adaln_zero | adaln_single (made once for all blocks)
    c.model.time_scale = 1000.0
    c.model.text_length = 0  # tokens, width and pooled width of the text encoder; 0: taken from it at start
    c.model.text_width = 0
    c.model.pooled_width = 0
    c.model.remat = "none"  # recomputed in the backward pass: none | dots (all but matrix products) | full

    # ---- sampling: what `sample`, `evaluate` and the grids of a run use unless told otherwise
    c.sample = ConfigDict()
    c.sample.sampler = "ddim"  # ddpm | ddim | dpmpp_2m | euler | euler_ancestral | heun
    c.sample.eta = 0.0  # ddim only: 0 deterministic .. 1 as noisy as ddpm
    c.sample.steps = 50
    c.sample.grid = "uniform"  # times of the steps: uniform | trailing | karras (usual for edm) | shifted
    c.sample.grid_shift = 3.0  # shifted only: above 1 more of the steps are near the noise
    c.sample.grid_rho = 7.0  # karras only: larger puts more of the steps near the picture
    c.sample.guidance_scale = 4.0  # 1 is off
    c.sample.guidance_interval = (0.0, 1.0)  # guided at times between; outside, a step costs half
    c.sample.guidance_rescale = 0.0  # 0 is off .. 1: how much of the contrast that guidance adds is taken back
    # adaptive projected guidance: what counts of the part of its step along the picture, 1 is off .. 0; and how long
    # the step may be, over all latent pixels of a picture, 0 is off
    c.sample.apg_parallel = 1.0
    c.sample.apg_norm = 0.0
    c.sample.strength = 0.6  # of an edit: 0 keeps the picture, 1 starts from noise; under a mask it is 1 unless told
    c.sample.prompts = ()  # of the grids; () takes captions of the training set. As a flag: "a,b" or "['a', 'b']"
    return c.lock()
