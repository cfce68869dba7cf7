// The part of PKCS#11 v2.40 that Keyferry uses: every call is made here, on the
// one function list that kf_load got. miekg/pkcs11 would get a list of its own,
// which some modules, p11-kit's client among them, answer with another instance
// of themselves; and it asks for the size of data first where that is known,
// which makes some tokens do the work twice and others fail.
//
// Names and layouts: PKCS #11 Cryptographic Token Interface Base Specification
// v2.40, sections 3 and 5. Structures are not packed on Unix.

#ifndef KEYFERRY_CALLS_H
#define KEYFERRY_CALLS_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long ck_ulong;
typedef unsigned char ck_byte;
typedef ck_ulong ck_rv;

typedef struct { ck_ulong type; void *value; ck_ulong len; } ck_attribute;
typedef struct { ck_ulong type; void *param; ck_ulong len; } ck_mechanism;
typedef struct { ck_ulong hash, mgf, source; void *label; ck_ulong label_len; } ck_oaep_params;
typedef struct { ck_byte *iv; ck_ulong iv_len, iv_bits; ck_byte *aad; ck_ulong aad_len, tag_bits; } ck_gcm_params;
typedef struct { ck_ulong bits; ck_byte block[16]; } ck_ctr_params;
// CK_C_INITIALIZE_ARGS. NSS reads its configuration in the place of pReserved
// and looks for a pReserved of its own behind it.
typedef struct { void *create, *destroy, *lock, *unlock; ck_ulong flags; void *reserved, *none; } ck_initialize_args;

typedef struct { ck_byte major, minor; } ck_version;
typedef struct {
	ck_version cryptoki;
	ck_byte manufacturer[32];
	ck_ulong flags;
	ck_byte description[32];
	ck_version version;
} ck_info;
typedef struct {
	ck_byte label[32], manufacturer[32], model[16], serial[16];
	ck_ulong flags, max_sessions, sessions, max_rw_sessions, rw_sessions, max_pin, min_pin, total_public, free_public,
	    total_private, free_private;
	ck_version hardware, firmware;
	ck_byte utc_time[16];
} ck_token_info;
typedef struct { ck_ulong slot, state, flags, device_error; } ck_session_info;
typedef struct { ck_ulong min_key, max_key, flags; } ck_mechanism_info;

typedef ck_rv (*ck_fn)();

// CK_FUNCTION_LIST of v2.x: a version, then the functions in the order of
// section 5 of the specification.
typedef struct {
	ck_byte major, minor;
	ck_fn Initialize, Finalize, GetInfo, GetFunctionList, GetSlotList, GetSlotInfo, GetTokenInfo, GetMechanismList,
	    GetMechanismInfo, InitToken, InitPIN, SetPIN, OpenSession, CloseSession, CloseAllSessions, GetSessionInfo,
	    GetOperationState, SetOperationState, Login, Logout, CreateObject, CopyObject, DestroyObject, GetObjectSize,
	    GetAttributeValue, SetAttributeValue, FindObjectsInit, FindObjects, FindObjectsFinal, EncryptInit, Encrypt,
	    EncryptUpdate, EncryptFinal, DecryptInit, Decrypt, DecryptUpdate, DecryptFinal, DigestInit, Digest, DigestUpdate,
	    DigestKey, DigestFinal, SignInit, Sign, SignUpdate, SignFinal, SignRecoverInit, SignRecover, VerifyInit, Verify,
	    VerifyUpdate, VerifyFinal, VerifyRecoverInit, VerifyRecover, DigestEncryptUpdate, DecryptDigestUpdate,
	    SignEncryptUpdate, DecryptVerifyUpdate, GenerateKey, GenerateKeyPair, WrapKey, UnwrapKey, DeriveKey, SeedRandom,
	    GenerateRandom;
} ck_functions;

// kf_load opens a module that stays loaded for the life of the process and
// returns its functions. On failure *why is dlerror's text, or NULL when the
// library is no PKCS#11 module.
static ck_functions *kf_load(const char *path, const char **why) {
	*why = NULL;
	void *lib = dlopen(path, RTLD_LAZY);
	if (lib == NULL) {
		*why = dlerror();
		return NULL;
	}
	ck_rv (*get)(ck_functions **) = (ck_rv(*)(ck_functions **))dlsym(lib, "C_GetFunctionList");
	ck_functions *f = NULL;
	if (get == NULL || get(&f) != 0) return NULL;
	return f;
}

// kf_mech is a mechanism with its parameters flattened, so that nothing that
// Go passes points to Go memory that points to Go memory.
enum { KF_NONE, KF_OAEP, KF_GCM, KF_IV, KF_CTR };
typedef struct { ck_ulong type; int kind; ck_ulong hash, mgf, tag_bits; } kf_mech;
typedef union { ck_oaep_params oaep; ck_gcm_params gcm; ck_ctr_params ctr; } kf_params;

static ck_mechanism kf_build(const kf_mech *m, kf_params *p, void *iv, ck_ulong iv_len, void *aad, ck_ulong aad_len) {
	ck_mechanism out = {m->type, NULL, 0};
	if (m->kind == KF_OAEP) {
		// CKZ_DATA_SPECIFIED with no data: the empty label.
		p->oaep = (ck_oaep_params){m->hash, m->mgf, 1, NULL, 0};
		out.param = &p->oaep;
		out.len = sizeof p->oaep;
	} else if (m->kind == KF_GCM) {
		p->gcm = (ck_gcm_params){iv, iv_len, iv_len * 8, aad, aad_len, m->tag_bits};
		out.param = &p->gcm;
		out.len = sizeof p->gcm;
	} else if (m->kind == KF_IV) {
		out.param = iv;
		out.len = iv_len;
	} else if (m->kind == KF_CTR) {
		p->ctr = (ck_ctr_params){.bits = 32};
		memcpy(p->ctr.block, iv, sizeof p->ctr.block);
		out.param = &p->ctr;
		out.len = sizeof p->ctr;
	}
	return out;
}

// kf_initialize lets the module lock by the operating system's means: calls
// come from many threads.
static ck_rv kf_initialize(ck_functions *f, char *reserved) {
	ck_initialize_args args = {.flags = 2 /* CKF_OS_LOCKING_OK */, .reserved = reserved};
	return f->Initialize(&args);
}
static ck_rv kf_finalize(ck_functions *f) { return f->Finalize(NULL); }
static ck_rv kf_info(ck_functions *f, ck_info *out) { return f->GetInfo(out); }
// kf_slots lists at most *n slots with a token in them.
static ck_rv kf_slots(ck_functions *f, ck_ulong *out, ck_ulong *n) { return f->GetSlotList((ck_byte)1, out, n); }
static ck_rv kf_token_info(ck_functions *f, ck_ulong slot, ck_token_info *out) { return f->GetTokenInfo(slot, out); }
static ck_rv kf_mechanisms(ck_functions *f, ck_ulong slot, ck_ulong *out, ck_ulong *n) {
	return f->GetMechanismList(slot, out, n);
}
static ck_rv kf_mechanism_info(ck_functions *f, ck_ulong slot, ck_ulong mech, ck_mechanism_info *out) {
	return f->GetMechanismInfo(slot, mech, out);
}
static ck_rv kf_open(ck_functions *f, ck_ulong slot, ck_ulong flags, ck_ulong *s) {
	return f->OpenSession(slot, flags, NULL, NULL, s);
}
static ck_rv kf_close(ck_functions *f, ck_ulong s) { return f->CloseSession(s); }
static ck_rv kf_session_info(ck_functions *f, ck_ulong s, ck_session_info *out) { return f->GetSessionInfo(s, out); }
static ck_rv kf_logout(ck_functions *f, ck_ulong s) { return f->Logout(s); }
static ck_rv kf_find_final(ck_functions *f, ck_ulong s) { return f->FindObjectsFinal(s); }
static ck_rv kf_login(ck_functions *f, ck_ulong s, ck_ulong user, void *pin, ck_ulong len) {
	return f->Login(s, user, (ck_byte *)pin, len);
}
static ck_rv kf_init_token(ck_functions *f, ck_ulong slot, void *pin, ck_ulong len, void *label) {
	return f->InitToken(slot, (ck_byte *)pin, len, (ck_byte *)label);
}
static ck_rv kf_init_pin(ck_functions *f, ck_ulong s, void *pin, ck_ulong len) {
	return f->InitPIN(s, (ck_byte *)pin, len);
}
static ck_rv kf_create(ck_functions *f, ck_ulong s, ck_attribute *t, ck_ulong n, ck_ulong *h) {
	return f->CreateObject(s, t, n, h);
}
static ck_rv kf_copy(ck_functions *f, ck_ulong s, ck_ulong o, ck_attribute *t, ck_ulong n, ck_ulong *h) {
	return f->CopyObject(s, o, t, n, h);
}
static ck_rv kf_set(ck_functions *f, ck_ulong s, ck_ulong o, ck_attribute *t, ck_ulong n) {
	return f->SetAttributeValue(s, o, t, n);
}
static ck_rv kf_digest_init(ck_functions *f, ck_ulong s, ck_ulong type) {
	ck_mechanism mech = {type, NULL, 0};
	return f->DigestInit(s, &mech);
}
static ck_rv kf_digest_key(ck_functions *f, ck_ulong s, ck_ulong key) { return f->DigestKey(s, key); }
static ck_rv kf_find_init(ck_functions *f, ck_ulong s, ck_attribute *t, ck_ulong n) {
	return f->FindObjectsInit(s, t, n);
}
static ck_rv kf_find(ck_functions *f, ck_ulong s, ck_ulong *out, ck_ulong max, ck_ulong *n) {
	return f->FindObjects(s, out, max, n);
}
static ck_rv kf_generate(ck_functions *f, ck_ulong s, const kf_mech *m, ck_attribute *t, ck_ulong n, ck_ulong *h) {
	ck_mechanism mech = {m->type, NULL, 0};
	return f->GenerateKey(s, &mech, t, n, h);
}
static ck_rv kf_generate_pair(ck_functions *f, ck_ulong s, const kf_mech *m, ck_attribute *pub, ck_ulong npub,
                              ck_attribute *priv, ck_ulong npriv, ck_ulong *hpub, ck_ulong *hpriv) {
	ck_mechanism mech = {m->type, NULL, 0};
	return f->GenerateKeyPair(s, &mech, pub, npub, priv, npriv, hpub, hpriv);
}
static ck_rv kf_unwrap(ck_functions *f, ck_ulong s, const kf_mech *m, ck_ulong key, void *in, ck_ulong len,
                       ck_attribute *t, ck_ulong n, ck_ulong *h) {
	kf_params p;
	ck_mechanism mech = kf_build(m, &p, NULL, 0, NULL, 0);
	return f->UnwrapKey(s, &mech, key, (ck_byte *)in, len, t, n, h);
}
static ck_rv kf_wrap(ck_functions *f, ck_ulong s, const kf_mech *m, ck_ulong wrapping, ck_ulong key, void *out, ck_ulong *len) {
	kf_params p;
	ck_mechanism mech = kf_build(m, &p, NULL, 0, NULL, 0);
	return f->WrapKey(s, &mech, wrapping, key, (ck_byte *)out, len);
}
static ck_rv kf_encrypt_init(ck_functions *f, ck_ulong s, const kf_mech *m, ck_ulong key, void *iv, ck_ulong iv_len, void *aad,
                             ck_ulong aad_len) {
	kf_params p;
	ck_mechanism mech = kf_build(m, &p, iv, iv_len, aad, aad_len);
	return f->EncryptInit(s, &mech, key);
}
static ck_rv kf_decrypt_init(ck_functions *f, ck_ulong s, const kf_mech *m, ck_ulong key, void *iv, ck_ulong iv_len, void *aad,
                             ck_ulong aad_len) {
	kf_params p;
	ck_mechanism mech = kf_build(m, &p, iv, iv_len, aad, aad_len);
	return f->DecryptInit(s, &mech, key);
}
static ck_rv kf_sign_init(ck_functions *f, ck_ulong s, const kf_mech *m, ck_ulong key) {
	ck_mechanism mech = {m->type, NULL, 0};
	return f->SignInit(s, &mech, key);
}
static ck_rv kf_encrypt(ck_functions *f, ck_ulong s, void *in, ck_ulong len, void *out, ck_ulong *out_len) {
	return f->Encrypt(s, (ck_byte *)in, len, (ck_byte *)out, out_len);
}
static ck_rv kf_decrypt(ck_functions *f, ck_ulong s, void *in, ck_ulong len, void *out, ck_ulong *out_len) {
	return f->Decrypt(s, (ck_byte *)in, len, (ck_byte *)out, out_len);
}
static ck_rv kf_sign(ck_functions *f, ck_ulong s, void *in, ck_ulong len, void *out, ck_ulong *out_len) {
	return f->Sign(s, (ck_byte *)in, len, (ck_byte *)out, out_len);
}
static ck_rv kf_attributes(ck_functions *f, ck_ulong s, ck_ulong o, ck_attribute *t, ck_ulong n) {
	return f->GetAttributeValue(s, o, t, n);
}
static ck_rv kf_random(ck_functions *f, ck_ulong s, void *out, ck_ulong len) {
	return f->GenerateRandom(s, (ck_byte *)out, len);
}
static ck_rv kf_destroy(ck_functions *f, ck_ulong s, ck_ulong o) { return f->DestroyObject(s, o); }

#endif
