"""What fdistill does with each field of a text encoder's config; see `fdistill.adapters.config_fields`."""

from __future__ import annotations

from fdistill.adapters.config_fields import QUANTIZED, Fields, names, refusals

#: What any config of transformers may hold beside its class's fields; nothing of it changes a text encoder's output.
_ANY_ENCODER = names(
    "architectures model_type transformers_version torch_dtype dtype name_or_path return_dict output_hidden_states "
    "output_attentions torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_encoder_decoder "
    "tie_encoder_decoder finetuning_task id2label label2id num_labels task_specific_params problem_type "
    "tokenizer_class prefix sep_token_id decoder_start_token_id gradient_checkpointing attn_implementation "
    "cache_implementation use_cache initializer_factor initializer_range attention_dropout dropout tie_word_embeddings",
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
)
_ANY_REFUSED = {
    **QUANTIZED,
    **refusals("pruned_heads", "encoders without some of their heads are not supported", None, {}),
    **refusals("cross_attention_hidden_size", "encoders that attend to other inputs are not supported"),
    **refusals("add_cross_attention is_decoder", "encoders that attend to other inputs are not supported", False),
}
_CLIP = Fields(
    names(
        "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads "
        "max_position_embeddings hidden_act layer_norm_eps pad_token_id bos_token_id eos_token_id"
    ),
    _ANY_ENCODER,
    _ANY_REFUSED,
)
_QWEN_TEXT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps use_sliding_window sliding_window max_window_layers layer_types rope_theta "
    "rope_scaling rope_parameters bos_token_id eos_token_id pad_token_id"
)
_QWEN3 = Fields(names(_QWEN_TEXT, "head_dim attention_bias"), _ANY_ENCODER, _ANY_REFUSED)
_QWEN_TOKENS = names("image_token_id video_token_id vision_start_token_id vision_end_token_id vision_token_id")

#: Class of a text encoder -> its fields. The library's own class runs, with the inputs that the pipeline gives it.
TEXT_ENCODER_FIELDS: dict[str, Fields] = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": Fields(
        names(
            "vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets "
            "relative_attention_max_distance layer_norm_epsilon feed_forward_proj dense_act_fn is_gated_act "
            "pad_token_id eos_token_id bos_token_id"
        ),
        _ANY_ENCODER
        | names("num_decoder_layers dropout_rate classifier_dropout scale_decoder_outputs n_positions output_past"),
        _ANY_REFUSED,
    ),
    "Gemma2Model": Fields(
        names(
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim hidden_activation max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters "
            "attention_bias query_pre_attn_scalar sliding_window layer_types attn_logit_softcapping "
            "use_bidirectional_attention pad_token_id bos_token_id eos_token_id"
        ),
        # Words are not predicted; and two fields of before hidden_activation and sliding_window had these names.
        _ANY_ENCODER | names("final_logit_softcapping hidden_act sliding_window_size"),
        _ANY_REFUSED,
    ),
    "Qwen2_5_VLForConditionalGeneration": Fields(
        names(_QWEN_TEXT, "text_config"), _ANY_ENCODER | _QWEN_TOKENS | {"vision_config"}, _ANY_REFUSED
    ),
    "Qwen3Model": _QWEN3,
    "Qwen3ForCausalLM": _QWEN3,
    "Mistral3ForConditionalGeneration": Fields(
        names(
            "text_config vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps sliding_window rope_theta "
            "rope_parameters bos_token_id eos_token_id pad_token_id"
        ),
        # It is given no images.
        _ANY_ENCODER
        | names(
            "vision_config image_token_index projector_hidden_act vision_feature_layer multimodal_projector_bias "
            "spatial_merge_size"
        ),
        _ANY_REFUSED,
    ),
}
