// PKCS#11 as an attacker calls it: with memory that another thread changes
// during the call, with a result written over the arguments, with an empty
// template that is not NULL, with NULL where the token expects a pointer.
// miekg/pkcs11 copies its arguments and hides all of that.
//
// The declarations are the thief's own, not those of hsm/internal/cryptoki: an
// adversary that shared the product's mistakes would find none of them.

#ifndef KEYFERRY_THIEF_H
#define KEYFERRY_THIEF_H

typedef unsigned long ulong_t;
typedef unsigned char byte_t;

typedef struct { ulong_t type; void *value; ulong_t len; } attribute_t;
typedef struct { ulong_t type; void *param; ulong_t len; } mechanism_t;
typedef struct { ulong_t hash, mgf, source; void *data; ulong_t len; } oaep_t;

typedef ulong_t (*call_t)();

// CK_FUNCTION_LIST of v2.x: the version, then the functions by their place.
typedef struct { byte_t version[2]; call_t call[68]; } functions_t;

functions_t *thief_load(const char *path);
ulong_t thief_attributes(functions_t *f, ulong_t session, ulong_t object, attribute_t *t, ulong_t n);
ulong_t thief_copy(functions_t *f, ulong_t session, ulong_t object, attribute_t *t, ulong_t n, ulong_t *handle);
ulong_t thief_digest_key(functions_t *f, ulong_t session, ulong_t hash, ulong_t object, byte_t *out, ulong_t *len);

// What every attack on C_UnwrapKey needs.
typedef struct {
	functions_t *f;
	ulong_t session, key;
	mechanism_t mechanism;
	oaep_t oaep; // what mechanism.param points to if mechanism.len is not 0
	byte_t *blob;
	ulong_t blob_len;
	attribute_t *template;
	ulong_t count;
} unwrap_t;

// What an attack brought: how many calls it took, how many of them the token
// answered with CKR_OK, and the value that was read, if len is not 0.
typedef struct { ulong_t tries, ok, len; byte_t value[64]; } loot_t;

enum { NO_MECHANISM, NO_BLOB, NO_TEMPLATE, NO_HANDLE };

ulong_t thief_unwrap(unwrap_t *u, ulong_t *handle);
ulong_t thief_unwrap_null(unwrap_t *u, int without);
void thief_alias(unwrap_t *u, const ulong_t *types, ulong_t n, loot_t *out);
void thief_race_template(unwrap_t *u, const ulong_t *types, const byte_t *want, ulong_t n, ulong_t tries, loot_t *out);
void thief_race_mechanism(unwrap_t *u, ulong_t other, ulong_t tries, loot_t *out);
void thief_race_result(unwrap_t *u, ulong_t own, ulong_t tries, loot_t *out);
void thief_race_object(unwrap_t *u, ulong_t session2, ulong_t tries, loot_t *out);
void thief_race_copy(unwrap_t *u, ulong_t session2, ulong_t tries, loot_t *out);

#endif
