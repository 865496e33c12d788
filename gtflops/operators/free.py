"""Operators without floating-point work: views, copies, fills, selections, integers and random numbers."""

from gtflops.operators.cost import NO_ARITHMETIC, Entry, Kind, entry, free

ENTRIES: tuple[Entry, ...] = (
    entry(
        Kind.RANDOM,
        free,
        """bernoulli rand rand_like randn randn_like randint randint_like uniform normal normal_functional exponential
        geometric cauchy log_normal poisson binomial multinomial randperm random
        prims.uniform prims.normal prims.inductor_seed prims.inductor_seeds prims.inductor_lookup_seed
        prims.inductor_random prims.inductor_randint prims.inductor_rand_eager_offset
        prims.inductor_rand_eager_offsets""",
        "random numbers are none",
        NO_ARITHMETIC,
    ),
    entry(
        Kind.FREE,
        free,
        """view _unsafe_view _reshape_alias t transpose permute expand unsqueeze squeeze slice
        select split split_with_sizes unsafe_split unsafe_split_with_sizes unbind as_strided detach alias diagonal
        unfold view_as_real view_as_complex lift_fresh lift _conj _neg_view slice_inverse values indices _values
        _indices _nested_view_from_jagged _nested_view_from_buffer _nested_get_values _nested_get_offsets
        _nested_get_lengths _nested_get_ragged_idx _nested_get_min_seqlen _nested_get_max_seqlen
        prims.as_strided prims.broadcast_in_dim prims.collapse_view prims.collapse prims.squeeze prims.split_dim
        prims.transpose prims.reshape prims.view_of prims.view_of_dtype prims.real prims.imag""",
        "views",
        NO_ARITHMETIC,
    ),
    entry(
        Kind.FREE,
        free,
        """empty empty_like empty_strided empty_permuted new_empty new_empty_strided zeros zeros_like new_zeros
        ones ones_like new_ones full full_like new_full zero fill arange range scalar_tensor eye linspace logspace
        tril_indices triu_indices set resize resize_as _efficientzerotensor _foreach_zero complex
        bartlett_window blackman_window hamming_window hann_window kaiser_window fft_fftfreq fft_rfftfreq
        prims.empty prims.empty_strided prims.empty_permuted prims.fill prims.full prims.full_like prims.scalar_tensor
        prims.iota prims.resize""",
        "allocation, fills and constant tables",
        NO_ARITHMETIC,
    ),
    entry(
        Kind.FREE,
        free,
        """clone copy _to_copy cat stack _stack _chunk_cat index _unsafe_index _unsafe_masked_index index_select gather
        take embedding where masked_fill masked_select masked_scatter masked_scatter_backward repeat repeat_interleave
        constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d slice_backward select_backward slice_scatter select_scatter scatter index_copy index_fill
        diagonal_backward diagonal_copy diagonal_scatter diag_embed block_diag flip roll rot90 tril triu lu_unpack
        unfold_backward as_strided_scatter as_strided_copy im2col pixel_shuffle pixel_unshuffle channel_shuffle
        max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d _pack_padded_sequence _copy_from _lazy_clone _pin_memory
        _nested_from_padded _nested_from_padded_tensor _jagged_to_padded_dense_forward _padded_dense_to_jagged_forward
        to_padded_tensor _to_dense _cudnn_rnn_flatten_weight _foreach_copy _foreach_clone
        view_copy expand_copy permute_copy slice_copy select_copy split_copy split_with_sizes_copy squeeze_copy
        lift_fresh_copy transpose_copy t_copy unsqueeze_copy unbind_copy unfold_copy alias_copy detach_copy
        prims.clone prims.cat prims.where prims.copy_to prims.copy_strided prims.as_strided_scatter prims.rev
        prims.convert_element_type prims.device_put prims.inductor_force_stride_order
        prims._low_memory_max_pool_offsets_to_indices""",
        "copies, casts and selections",
        NO_ARITHMETIC,
    ),
    entry(
        Kind.FREE,
        free,
        """bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift __lshift__ __rshift__
        __ilshift__ __irshift__ bincount nonzero nonzero_static count_nonzero searchsorted bucketize isin gcd lcm
        _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive histc _local_scalar_dense equal
        is_same_size is_pinned _is_all_true _is_any_true
        _nested_tensor_from_mask_left_aligned _assert_async _assert_scalar _functional_assert_async
        _functional_assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size
        _functional_sym_constrain_range _functional_sym_constrain_range_for_size _linalg_check_errors
        profiler._record_function_enter_new profiler._record_function_exit
        _has_same_storage_numel _fused_sdp_choice _coalesced _nnz sparse_dim dense_dim is_coalesced record_stream
        prims.bitwise_and prims.bitwise_or prims.bitwise_xor prims.bitwise_not prims.shift_left
        prims.shift_right_arithmetic prims.gcd prims.xor_sum prims.item prims.maximum_value prims.minimum_value
        prims._make_token prims._sink_tokens""",
        "integers, bits and questions to the host",
        NO_ARITHMETIC,
    ),
)
